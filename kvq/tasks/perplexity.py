"""Loss on held-out text in one pass over the quantized cache, with top-1 agreement and KL against fp16 on the same positions.

Non-overlapping windows of `context` tokens (GSRQ's protocol); every token's keys and values are coded, also for its own query.
Perplexity alone misleads, so each window also reports KL(fp16 || quantized) in nats and the share of equal argmax tokens.
"""

import hashlib
import math
from collections.abc import Iterator

import torch

from kvq import calibrate
from kvq.errors import Refusal
from kvq.records import Example, Record

SOURCES = {"embedded": "standin:heldout", "hub": "hub:wikitext:wikitext-2-raw-v1:test"}
ROWS = 1024


class Perplexity:
    """data: `embedded`, `hub` (WikiText-2 test), a text file, or hub:<dataset>:<config>:<split>. limit: windows; null takes all."""

    one_pass = True
    metric = "loss"

    def __init__(self, data: str, limit: int | None, subsets: list[str] | None, context: int, batch_size: int, seed: int = 0):
        if subsets:
            raise Refusal("perplexity has no subsets; drop task.subsets.")
        self.data, self.limit, self.context, self.batch_size = data, limit, context, batch_size
        self.source = SOURCES.get(data, data)

    def check(self) -> None:
        """Read the text before a model is loaded, and fingerprint it."""
        if not self.source.startswith("hub:"):
            self.content = hashlib.sha256(calibrate.text(self.source).encode()).hexdigest()[:16]

    def examples(self, lm) -> list[Example]:
        if self.context > lm.max_length:
            raise Refusal(f"task.context={self.context} is longer than {lm.name} allows ({lm.max_length}).")
        ids = lm.tokenizer(calibrate.text(self.source), add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
        count = len(ids) // self.context if self.limit is None else self.limit
        samples = calibrate.windows(lm.tokenizer, self.source, max(count, 1), self.context)
        return [Example(f"text/{i}", "text", ids) for i, ids in enumerate(samples)]

    def run(self, lm, examples: list[Example]) -> Iterator[Record]:
        for start in range(0, len(examples), self.batch_size):
            batch = examples[start : start + self.batch_size]
            ids = torch.stack([e.payload for e in batch]).to(lm.device)
            mine, plain = lm.logits(ids), lm.reference.logits(ids)
            for example, row, a, b in zip(batch, ids, mine, plain):
                yield {"id": example.id, "subset": example.subset, "metrics": compare(a, b, row), "prediction": None, "target": None}


def compare(logits: torch.Tensor, reference: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """loss (nats per token, next token), top1 (share of equal argmax) and kl(reference || logits); logits [T, V], ids [T]."""
    total = {"loss": 0.0, "top1": 0.0, "kl": 0.0}
    count = len(ids) - 1
    for start in range(0, count, ROWS):
        part = slice(start, min(start + ROWS, count))
        p, q = reference[part].float().log_softmax(-1), logits[part].float().log_softmax(-1)
        target = ids[part.start + 1 : part.stop + 1, None].to(q.device)
        total["loss"] -= q.gather(1, target).sum().item()
        total["top1"] += (p.argmax(-1) == q.argmax(-1)).sum().item()
        total["kl"] += (p.exp() * (p - q)).sum().item()
    metrics = {name: value / count for name, value in total.items()}
    if not all(math.isfinite(v) for v in metrics.values()):
        raise ValueError("The logits are not finite: the model or the quantizer overflowed; try model.dtype=float32.")
    return metrics
