"""Work in batches that fit the memory, longest first, and prompts that begin alike together, so that their beginning is read once.

A size of `auto` is estimated from the free memory and the model's shape, and halved whenever a batch turns out too large. Answers do
not depend on the size: rows are independent, left padding is masked, and where it could enter a window or a token group rows are coded apart.
Rounding does: another batch or a shared beginning multiplies matrices of other shapes. On the stand-in a likelihood moves by at most 3e-5
nats in float32, .05 in float16 and .3 in bfloat16 (48 choices behind 24 lines, an exact cache); a greedy answer can part where two tokens are that close.
"""

from collections.abc import Callable, Iterator

import torch

from kvq.cache import coded_shapes
from kvq.errors import Refusal
from kvq.prompt import left_pad, until_stop

AUTO = "auto"
LARGEST = 64
"""Rows of an automatic batch: beyond this, longer rounds of padding cost more than they save."""
SHARE = 0.7
"""Part of the free memory that an automatic batch may plan with."""
LEAST = 64
"""A common beginning of fewer tokens is not worth a cache of its own."""


def check(size, name: str = "task.batch_size") -> None:
    """Raise Refusal unless size is `auto` or a whole number from 1 on."""
    if size != AUTO and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise Refusal(f"{name}={size} must be a whole number of at least 1, or auto.")


def run(
    lm, items: list, size: int | str, work: Callable[[list, int], list], tokens: Callable, *, prefill: int | None = None, logits: int = 1
) -> Iterator[tuple]:  # fmt: skip
    """Yield (item, result) in order; work(batch, rows) returns one result per item of a batch of up to rows items.

    tokens(item): tokens its row will hold. prefill: tokens read in one forward, if not all. logits: positions of a row whose logits
    are computed (0: all). Raises Refusal where `rows` of a given size, or one, do not fit.
    """
    start, most = 0, LARGEST
    while start < len(items):
        rows = min(most, estimate(lm, tokens(items[start]), prefill, logits)) if size == AUTO else size
        batch = items[start : start + rows]
        try:
            results = work(batch, rows)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            too_large = error
        else:
            too_large = None
        if too_large is None:
            lm.book("batches", len(batch) / rows)
            yield from zip(batch, results, strict=True)
            start += len(batch)
            continue
        lm.drop()
        rows = min(rows, len(batch))
        if size != AUTO or rows == 1:
            advice = "set task.batch_size=auto or a smaller one" if rows > 1 else "set task.chunk or a shorter task.context, or use a larger device"
            raise Refusal(f"{rows} x {tokens(batch[0])} tokens do not fit in memory: {advice}.") from too_large
        most = rows // 2


def estimate(lm, tokens: int, prefill: int | None = None, logits: int = 1) -> int:
    """Rows of `tokens` tokens that fit in a share of the free memory, from 1 to LARGEST.

    Counted per row: the cache (codes no larger than the original, the decoded copy and its growth), one layer's activations and
    float32 copies of its keys and values, the attention mask, and float32 logits with their softmax.
    """
    config, item = lm.model.config.get_text_config(decoder=True), torch.finfo(lm.model.dtype).bits // 8
    cell = sum(2 * heads * dim for heads, dim in coded_shapes(lm.model.config).values())
    at_once = min(prefill or tokens, tokens)
    cache = tokens * cell * config.num_hidden_layers * item * 2.25
    layer = at_once * item * (8 * config.hidden_size + 4 * getattr(config, "intermediate_size", 4 * config.hidden_size)) + tokens * cell * 4 * 4
    mask = at_once * tokens * (1 + item)
    head = (logits or at_once) * config.vocab_size * 4 * 3
    return int(min(max(SHARE * free_bytes(lm.device) // (cache + layer + mask + head), 1), LARGEST))


def free_bytes(device: torch.device) -> int:
    """Bytes that new tensors can take on the device, what torch holds unused included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil  # a dependency of accelerate; not needed on a GPU

    return psutil.virtual_memory().available


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def together(prompts: list[list[int]], least: int = LEAST) -> list[tuple[int, list[int]]]:
    """(tokens in common at the beginning, indices) of prompts that begin alike, then (0, all others); each longest first.

    Prompts join while at least `least` tokens and half of the longest are common; two tokens of each are left to read.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    found, alone, at = [], [], 0
    while at < len(order):
        group, common = [order[at]], len(prompts[order[at]]) - 2
        for index in order[at + 1 :]:
            both = _common(prompts[group[-1]], prompts[index], common)
            both = min(both, len(prompts[index]) - 2)
            if both < least or 2 * both < max(len(prompts[i]) for i in (*group, index)):
                break
            group, common = [*group, index], both
        if len(group) > 1:
            found.append((common, sorted(group, key=lambda i: -len(prompts[i]))))
        else:
            alone += group
        at += len(group)
    found.sort(key=lambda pair: -len(prompts[pair[1][0]]))
    return [*found, *([(0, sorted(alone, key=lambda i: -len(prompts[i])))] if alone else [])]


def _common(a: list[int], b: list[int], most: int) -> int:
    most = max(min(most, len(a), len(b)), 0)
    return next((i for i in range(most) if a[i] != b[i]), most)


def answers(lm, prompts: list[list[int]], cap: int, size: int | str, stops: list[int], *, chunk: int | None = None, options=None) -> Iterator[tuple[int, list[int], bool]]:
    """Yield (index of the prompt, token ids up to the first stop, whether there was one) as soon as its batch is done.

    cap: new tokens at most. options(indices, width): further keywords of the generate call for a batch padded to `width` tokens.
    """
    pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else stops[0]
    groups = together(prompts) if lm.shareable else [(0, sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))]
    for shared, indices in groups:

        def work(batch, rows, shared=shared):
            ids, mask = left_pad([prompts[i] for i in batch], pad)
            more = options(batch, ids.shape[1]) if options else {}
            return lm.generate(ids, mask, cap, stops, chunk=chunk, shared=shared, **more).tolist()

        for index, row in run(lm, indices, size, work, lambda i: len(prompts[i]) + cap, prefill=chunk):
            yield index, until_stop(row, [*stops, pad]), any(token in stops for token in row)
