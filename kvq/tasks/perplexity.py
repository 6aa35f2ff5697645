"""Loss on held-out text over the quantized cache, with top-1 agreement and KL against fp16 on the same positions.

stride null: non-overlapping windows of `context` tokens, the rest of the text dropped, the first token of each window unscored
(GPTQ's convention, GSRQ Table 1). stride s: windows start every s tokens and run to the end of the text, and each token is scored
once, in the first window that holds it (the sliding window of transformers' perplexity guide; Block-GTQ Table 3: context 4096, stride
512). No token is put in front of a window.

One pass codes every token before its own query sees it. That is what decoding sees while the exact window is 0 and tokens are coded
one by one; with a window or token groups it shows early queries coded keys that decoding would still hold exactly. `streamed` feeds
the cache token by token, so every query sees what it would see in decoding: the reference for any window, and slow.

Perplexity alone misleads, so each window also reports KL(fp16 || quantized) in nats and the share of equal argmax tokens.
"""

import functools
import hashlib
import math
import time
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from kvq import batches, calibrate, statistics
from kvq.errors import Refusal
from kvq.records import Example, Record

SOURCES = {"embedded": "standin:heldout", "hub": "hub:wikitext:wikitext-2-raw-v1:test"}
ROWS = 1024

text = functools.lru_cache(maxsize=2)(calibrate.text)


class Perplexity:
    """data: `embedded`, `hub` (WikiText-2 test), a text file, or hub:<dataset>:<config>:<split>. limit: windows; null takes all.

    context: tokens per window. stride: null, or the tokens from one window's start to the next. streamed: token by token.
    """

    metric = "loss"
    perfect = 0.0

    def __init__(
        self, data: str, limit: int | None, subsets: list[str] | None, context: int, batch_size: int = 1, stride: int | None = None,
        streamed: bool = False, seed: int = 0,
    ):  # fmt: skip
        if subsets:
            raise Refusal("perplexity has no subsets; drop task.subsets.")
        for name, value, least in (("limit", limit, 1), ("context", context, 2), ("stride", stride, 1)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise Refusal(f"task.{name}={value} must be a whole number of at least {least}.")
        batches.check(batch_size)
        if stride and stride >= context:
            raise Refusal(f"task.stride={stride} must be below task.context={context}, so that every token is scored; null means windows side by side.")
        if not isinstance(streamed, bool):
            raise Refusal(f"task.streamed={streamed} is not one of true, false.")
        self.data, self.limit, self.context, self.batch_size = data, limit, context, batch_size
        self.stride, self.streamed, self.one_pass = stride, streamed, not streamed
        self.source = SOURCES.get(data, data)

    def check(self) -> None:
        """Read the text before a model is loaded, and fingerprint it. Raises Refusal if there is none."""
        self.content = hashlib.sha256(text(self.source).encode()).hexdigest()[:16]

    def fits(self, max_length: int, name: str) -> None:
        """Raise Refusal if a window is longer than a model of `max_length` tokens allows."""
        if self.context > max_length:
            raise Refusal(f"task.context={self.context} is longer than {name} allows ({max_length}): set it to {max_length} or less.")

    def examples(self, lm) -> list[Example]:
        """One example per window; payload (ids [T], first scored position). Raises Refusal if the text or the model is too short."""
        self.fits(lm.max_length, lm.name)
        ids = lm.tokenizer(text(self.source), add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
        spans = windows(len(ids), self.context, self.stride)
        if len(spans) < (self.limit or 1):
            raise Refusal(
                f"The text '{self.source}' has {len(ids)} tokens, which is {len(spans)} windows of {self.context}, {self.limit or 1} were asked for; "
                "lower task.limit or task.context, or give more text."
            )
        return [Example(f"text/{i}", "text", (ids[start:end], first)) for i, (start, end, first) in enumerate(spans[: self.limit])]

    def run(self, lm, examples: list[Example]) -> Iterator[Record]:
        """Score windows of one length together, so that no padding exists; weight is the number of scored tokens."""
        for _, group in groupby(examples, key=lambda e: len(e.payload[0])):
            for example, metrics in batches.run(lm, list(group), self.batch_size, lambda batch, _: self._score(lm, batch), lambda e: len(e.payload[0]), logits=0):
                ids, first = example.payload
                yield {
                    "id": example.id, "subset": example.subset, "metrics": metrics, "prediction": None, "target": None,
                    "weight": len(ids) - first, "chance": math.log(lm.model.config.get_text_config(decoder=True).vocab_size),
                }  # fmt: skip

    def _score(self, lm, batch: list[Example]) -> list[dict[str, float]]:
        ids = torch.stack([e.payload[0] for e in batch]).to(lm.device)
        mine = stream(lm, ids) if self.streamed else lm.logits(ids)
        return [compare(a, b, row, e.payload[1]) for e, row, a, b in zip(batch, ids, mine, lm.reference.logits(ids))]

    def derived(self, records: list[Record]) -> list[dict]:
        """Perplexity, exp of the mean loss per token; its standard error to first order."""
        table = statistics.summarize(records)
        row = table[table.metric == "loss"].iloc[0]
        value = math.exp(row["value"])
        return [{"subset": row["subset"], "metric": "perplexity", "value": value, "stderr": value * row["stderr"], "n": row["n"]}]


def windows(length: int, context: int, stride: int | None) -> list[tuple[int, int, int]]:
    """(start, end, first scored position within the window) for a text of `length` tokens."""
    if stride is None:
        return [(start, start + context, 1) for start in range(0, length - context + 1, context)]
    spans, scored = [], 1
    for start in range(0, length, stride):
        end = min(start + context, length)
        if end > scored:
            spans.append((start, end, scored - start))
        scored = end
        if end == length:
            break
    return spans


@torch.inference_mode()
def stream(lm, ids: Tensor) -> Tensor:
    """[B, T] token ids to [B, T, V] logits, one token per forward over one cache."""
    start, cache, rows = time.perf_counter(), lm.new_cache(), []
    for t in range(ids.shape[1]):
        positions = torch.full((len(ids), 1), t, device=ids.device)
        rows.append(lm.model(ids[:, t : t + 1], position_ids=positions, past_key_values=cache).logits)
    logits = torch.cat(rows, dim=1)
    lm.book("generation_seconds", time.perf_counter() - start)
    return logits


def compare(logits: Tensor, reference: Tensor, ids: Tensor, first: int = 1) -> dict[str, float]:
    """Means over the tokens ids[first:]: loss (nats), top1 (share of equal argmax) and kl(reference || logits); logits [T, V], ids [T]."""
    total = {"loss": 0.0, "top1": 0.0, "kl": 0.0}
    for start in range(first - 1, len(ids) - 1, ROWS):
        part = slice(start, min(start + ROWS, len(ids) - 1))
        p, q = reference[part].float().log_softmax(-1), logits[part].float().log_softmax(-1)
        target = ids[part.start + 1 : part.stop + 1, None].to(q.device)
        total["loss"] -= q.gather(1, target).sum().item()
        total["top1"] += (p.argmax(-1) == q.argmax(-1)).sum().item()
        total["kl"] += (p.exp() * (p - q)).sum().item()
    metrics = {name: value / (len(ids) - first) for name, value in total.items()}
    if not all(math.isfinite(v) for v in metrics.values()):
        raise ValueError("The logits are not finite: the model or the quantizer overflowed; try model.dtype=float32.")
    return metrics
