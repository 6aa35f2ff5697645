"""Attention of a chunk of queries over scalar codes in pages: tiles are rebuilt once for all query heads, then tensor cores attend.

A span of the packed past becomes float16 keys and values in stored order, rotations left out (the query is turned once, the output turned
back once), and every query head of its group reads it. Spans follow one another, so a transient has the size of a span whatever the length.
"""

import math

import torch
from torch import Tensor

from kernels import backend
from kernels.attention import Part, merge
from kernels.pages import Pages, stored_values

SCRATCH = 64 << 20  # bytes of rebuilt keys and values at a time
ROWS = 256  # queries whose scores the definition holds at a time
BLOCK = 64  # tokens of a step of the kernel: spans are whole multiples


def attend_chunk(query: Tensor, key: Tensor, value: Tensor, scale: float, at: int, first: Tensor | None = None, window: int | None = None) -> Part:
    """Causal attention of query [B, Hq, C, D] over key and value [B, H, T, D]: output [B, Hq, C, D] and log-sum-exp [B, Hq, C], float32.

    Query i stands at position `at` + i, key j at j; `at` may be negative (keys that begin inside the chunk). first [B]: first visible
    position. window: a query sees its own position and the window - 1 before it.
    """
    if backend.use_triton(query):
        return _launch(query, key, value, scale, at, first, window)
    if query.shape[2] > ROWS:
        parts = [attend_chunk(part, key, value, scale, at + i * ROWS, first, window) for i, part in enumerate(query.split(ROWS, 2))]
        return tuple(torch.cat(x, 2) for x in zip(*parts))
    batch, heads, tokens, dim = key.shape
    grouped = query.float().unflatten(1, (heads, -1)) * scale
    score = grouped @ key.float().mT[:, :, None]  # [B, H, G, C, T]
    i, j = at + torch.arange(query.shape[2], device=key.device)[:, None], torch.arange(tokens, device=key.device)
    seen = (j <= i) & (j > i - (window or tokens + i.abs().max() + 1))
    seen = seen.expand(batch, -1, -1) if first is None else seen & (j >= first[:, None, None])
    score = score.masked_fill(~seen[:, None, None], -torch.inf)
    lse = score.logsumexp(-1) if tokens else score.new_full(score.shape[:4], -torch.inf)
    weight = (score - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None]).exp()
    return (weight @ value.float()[:, :, None]).flatten(1, 2), lse.flatten(1, 2)


def attend_pages(query: Tensor, key: Pages, value: Pages, tokens: int, at: int, *, scale: float, first: Tensor | None = None, window: int | None = None) -> Part:
    """:func:`attend_chunk` over the first `tokens` tokens of pages, without a decoded copy of more than a span."""
    k, v = key.spec, value.spec
    batch, count = query.shape[0], min(tokens, at + query.shape[2])
    dtype = query.dtype if query.dtype == torch.float32 else torch.float16
    grouped = query.float().unflatten(1, (k.heads, -1))  # [B, H, G, C, D]
    turned = grouped if k.rotation is None else grouped @ k.rotation[:, None].mT
    turned = turned.flatten(1, 2).to(dtype)
    span = max(1, SCRATCH // (batch * k.heads * (k.dim + v.dim) * torch.finfo(dtype).bits // 8 * BLOCK)) * BLOCK
    begin = 0 if window is None else max(0, at - window + 1) // BLOCK * BLOCK
    whole = None
    for start in range(begin, max(count, begin + 1), span):
        stop = min(count, start + span)
        part = [stored(pages, start, max(start, stop), dtype) for pages in (key, value)]
        part = attend_chunk(turned, *part, scale, at - start, None if first is None else first - start, window)
        whole = part if whole is None else merge([whole, part])
    output, lse = whole
    if k.mean is not None:
        lse = lse + (grouped @ k.mean[:, None, :, None]).squeeze(-1).flatten(1, 2) * scale
    output = output.unflatten(1, (v.heads, -1))
    output = output if v.rotation is None else output @ v.rotation[:, None]
    # A query that sees nothing gives zeros, not the mean.
    output = output if v.mean is None else output + v.mean[:, None, None] * (lse.unflatten(1, (v.heads, -1)) > -torch.inf)[..., None]
    return output.flatten(1, 2), lse


def stored(pages: Pages, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Tokens start (a multiple of 32) to stop of pages in stored order, neither turned back nor with their mean: [B, H, stop - start, D] of dtype."""
    if not backend.use_triton(pages.words):
        return stored_values(pages.spec, *pages.symbols(start, stop)).to(dtype)
    from kernels import prefill_triton as twin

    spec, table, count = pages.spec, pages.table, stop - start
    batch = len(pages.words if table is None else table)
    out = torch.empty(batch, spec.heads, count, spec.dim, dtype=dtype, device=pages.words.device)
    tiles = pages.layout.tiles
    if count:
        twin.stored_tokens[(-(-count // 32), spec.heads, batch)](
            pages.words, pages.sides, tiles, spec.levels, pages.words if table is None else table, out, *pages.strides()[:2], pages.strides()[3], pages.sides.shape[-2],
            len(spec.segments), start, stop, 0 if table is None else table.stride(0),
            spec.heads, tiles.shape[1], spec.dim, pages.strides()[2], spec.log8, spec.offset, spec.bare, spec.channels, table is not None,
        )  # fmt: skip
    return out


def _launch(query: Tensor, key: Tensor, value: Tensor, scale: float, at: int, first: Tensor | None, window: int | None) -> Part:
    from kernels import prefill_triton as twin

    batch, heads, chunk, dim = query.shape
    tokens, group = key.shape[2], heads // key.shape[1]
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    output = torch.empty(batch, heads, chunk, dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(batch, heads, chunk, dtype=torch.float32, device=query.device)
    first = torch.zeros(batch, dtype=torch.int32, device=query.device) if first is None else first.int()
    rows, wide = (32, query.dtype == torch.float32) if query.dtype == torch.float32 or chunk <= 32 else (128, False)
    twin.attend_rows[(-(-chunk // rows), batch * heads)](
        query, key, value, output, lse, first, chunk, tokens, at, 2**30 if window is None else window, scale * math.log2(math.e),
        heads, group, dim, max(16, 1 << (dim - 1).bit_length()), rows, 32 if wide else BLOCK, num_warps=8 if rows == 128 else 4, num_stages=2 if wide else 3,
    )  # fmt: skip
    return output, lse
