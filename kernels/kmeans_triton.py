"""Clustering on CUDA tensors: nearest entries with an online maximum (no N x K matrix) and weighted sums of sorted members.

Obeys `kernels.kmeans`. Products run on tensor cores in the dtype of x with float32 accumulation: float16 and bfloat16 as they are,
float32 as tf32. Sums read the members of an entry in the order of a stable sort, so equal inputs give equal bits; no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # members a program of `_segment` gathers at once
SHARE = 512  # members that one program should get on average; a populous entry is split into fixed shares
WHOLE = 256  # widest vector that stays in registers while the entries stream past

# (rows, entries, warps, stages) of an assignment tile by element size; measured on an H200 (kernels/NOTES.md)
TILES = {2: (128, 128, 8, 3), 4: (128, 64, 8, 3)}


@triton.jit
def _assign(
    x, c, bias, labels, scores, n, k,
    D: tl.constexpr, BD: tl.constexpr, DEPTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    own, entry = x + group * n * D + rows[:, None].to(tl.int64) * D, c + group * k * D
    inside = rows[:, None] < n
    columns = tl.arange(0, BK)
    best = tl.full([BN, BK], float("-inf"), tl.float32)
    place = tl.zeros([BN, BK], tl.int32)
    if DEPTH == 1:
        tile = tl.load(own + d[None, :], mask=inside & (d[None, :] < D), other=0.0)
    for first in tl.range(0, k, BK, num_stages=STAGES):
        at = first + columns
        real = at[None, :] < k
        if DEPTH == 1:
            table = tl.load(entry + at[None, :] * D + d[:, None], mask=real & (d[:, None] < D), other=0.0)
            product = tl.dot(tile, table, input_precision=PRECISION)
        else:
            product = tl.zeros([BN, BK], tl.float32)
            for part in tl.static_range(DEPTH):
                e = part * BD + d
                some = tl.load(own + e[None, :], mask=inside & (e[None, :] < D), other=0.0)
                table = tl.load(entry + at[None, :] * D + e[:, None], mask=real & (e[:, None] < D), other=0.0)
                product = tl.dot(some, table, product, input_precision=PRECISION)
        score = product + tl.load(bias + group * k + at, mask=at < k, other=float("-inf"))[None, :]
        better = score > best
        best = tl.where(better, score, best)
        place = tl.where(better, first, place)
    top = tl.max(best, 1)
    label = tl.min(tl.where(best == top[:, None], place + columns[None, :], k - 1), 1)
    out = group * n + rows
    tl.store(labels + out, label, mask=rows < n)
    tl.store(scores + out, top, mask=rows < n)


@triton.jit
def _segment(
    x, pull, order, bounds, total, mass, entries,
    D: tl.constexpr, BD: tl.constexpr, WEIGHTINGS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    entry, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(bounds + entry), tl.load(bounds + entry + 1)
    share = tl.cdiv(end - begin, SPLITS)
    begin += split * share
    end = tl.minimum(end, begin + share)
    d, r = tl.arange(0, BD), tl.arange(0, ROWS)
    first = tl.zeros([ROWS, BD], tl.float32)
    first_mass = tl.zeros([ROWS], tl.float32)
    second, second_mass = first, first_mass
    for at in tl.range(begin, end, ROWS, num_stages=2):
        live = at + r < end
        row = tl.load(order + at + r, mask=live, other=0)
        vector = tl.load(x + row[:, None] * D + d[None, :], mask=live[:, None] & (d[None, :] < D), other=0.0).to(tl.float32)
        weight = tl.load(pull + row * WEIGHTINGS, mask=live, other=0.0)
        first += weight[:, None] * vector
        first_mass += weight
        if WEIGHTINGS == 2:
            weight = tl.load(pull + row * WEIGHTINGS + 1, mask=live, other=0.0)
            second += weight[:, None] * vector
            second_mass += weight
    out = split * WEIGHTINGS * entries + entry
    tl.store(total + out * D + d, tl.sum(first, 0), mask=d < D)
    tl.store(mass + out, tl.sum(first_mass, 0))
    if WEIGHTINGS == 2:
        tl.store(total + (out + entries) * D + d, tl.sum(second, 0), mask=d < D)
        tl.store(mass + out + entries, tl.sum(second_mass, 0))


def nearest(x: Tensor, entries: Tensor, bias: Tensor, tile: tuple[int, int, int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Index int32 [G, N] of the entry with the largest x.c + bias and that score, float32 [G, N]; a tie goes to the lower index.

    x [G, N, D] float16, bfloat16 or float32; entries [G, K, D], rounded to the dtype of x; bias [G, K] float32.
    """
    groups, n, width = x.shape
    x, entries, bias = x.contiguous(), entries.to(x.dtype).contiguous(), bias.contiguous()
    labels, scores = torch.empty(groups, n, dtype=torch.int32, device=x.device), torch.empty(groups, n, device=x.device)
    block = max(16, triton.next_power_of_2(width))
    depth = 1
    if block > WHOLE // (x.element_size() // 2):
        block = 64
        depth = triton.cdiv(width, block)
    rows, columns, warps, stages = tile or TILES[x.element_size()]
    columns = min(columns, max(16, triton.next_power_of_2(entries.shape[1])))
    _assign[triton.cdiv(n, rows), groups](
        x, entries, bias, labels, scores, n, entries.shape[1],
        D=width, BD=block, DEPTH=depth, BN=rows, BK=columns, STAGES=stages, PRECISION="tf32", num_warps=warps,
    )  # fmt: skip
    return labels, scores


def sums(x: Tensor, weights: Tensor, labels: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Summed weight [S, G, K] and weighted sums [S, G, K, D], float32, for S = 1 or 2 weightings [S, G, N] of one labelling.

    x [G, N, D] float16, bfloat16 or float32; labels [G, N] integers in [0, entries).
    """
    groups, n, width = x.shape
    several, count = len(weights), groups * entries
    key = labels + torch.arange(groups, device=x.device, dtype=labels.dtype)[:, None] * entries
    key = key.to(torch.int16 if count < 2**15 else torch.int32)
    ordered, order = torch.sort(key.flatten(), stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(count + 1, device=x.device, dtype=key.dtype))
    splits = max(1, min(8, n // (entries * SHARE)))
    total = torch.empty(splits, several, count, width, device=x.device)
    mass = torch.empty(splits, several, count, device=x.device)
    pull = weights.movedim(0, -1).contiguous()
    block = triton.next_power_of_2(width)
    _segment[count, splits](
        x.contiguous(), pull, order, bounds, total, mass, count,
        D=width, BD=block, WEIGHTINGS=several, SPLITS=splits, ROWS=max(4, min(ROWS, 8192 // block)), num_warps=4,
    )  # fmt: skip
    return mass.sum(0).view(several, groups, entries), total.sum(0).view(several, groups, entries, width)
