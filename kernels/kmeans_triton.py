"""Clustering on CUDA tensors: nearest entries with an online maximum (no N x K matrix) and weighted sums of sorted members.

Obeys `kernels.kmeans`. Products run on tensor cores in the dtype of x with float32 accumulation: float16 and bfloat16 as they are,
float32 as tf32. Sums read the members of an entry in the order of a stable sort, so equal inputs give equal bits; no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WHOLE = 512  # bytes of the widest vector that stays while the entries stream past
# (vectors, entries, warps, stages) of an assignment tile, measured on an H200 (kernels/NOTES.md); wider vectors are read in parts
TILE, WIDE = (256, 64, 8, 3), (128, 64, 8, 2)
# (members gathered at once, warps, stages, members a program should get on average); rows are kept apart in registers only where lanes keep
# them apart, so a program needs 80 registers and as many bytes are on their way as shared memory holds
GATHER = (64, 2, 3, 256)


@triton.jit
def _assign(
    x, c, bias, weights, squares, before, labels, scores, facts, n, k,
    D: tl.constexpr, BD: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, ASSESS: tl.constexpr, AGAIN: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    columns, d = tl.arange(0, BK), tl.arange(0, BD)
    inside = rows < n
    own, entry = x + group * n * D + rows[:, None].to(tl.int64) * D, c + group * k * D
    best, label = tl.full([BN], float("-inf"), tl.float32), tl.zeros([BN], tl.int32)
    if DEPTH == 1:  # the vectors stay, the entries stream past
        tile = tl.load(own + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0.0)
        for first in tl.range(0, k, BK, num_stages=STAGES):
            at = first + columns
            if EVEN:
                table, offset = tl.load(entry + at[None, :] * D + d[:, None]), tl.load(bias + group * k + at)
            else:
                table = tl.load(entry + at[None, :] * D + d[:, None], mask=(at[None, :] < k) & (d[:, None] < D), other=0.0)
                offset = tl.load(bias + group * k + at, mask=at < k, other=float("-inf"))
            score = tl.dot(tile, table, input_precision="tf32") + offset[None, :]
            top, place = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=False)
            label = tl.where(top > best, first + place, label)
            best = tl.maximum(best, top)
    else:
        for first in range(0, k, BK):
            at = first + columns
            score = tl.zeros([BN, BK], tl.float32) + tl.load(bias + group * k + at, mask=at < k, other=float("-inf"))[None, :]
            for part in tl.range(0, DEPTH * BD, BD, num_stages=STAGES):
                e = part + d
                some = tl.load(own + e[None, :], mask=inside[:, None] & (e[None, :] < D), other=0.0)
                table = tl.load(entry + at[None, :] * D + e[:, None], mask=(at[None, :] < k) & (e[:, None] < D), other=0.0)
                score = tl.dot(some, table, score, input_precision="tf32")
            top, place = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=False)
            label = tl.where(top > best, first + place, label)
            best = tl.maximum(best, top)
    out = group * n + rows
    if ASSESS:  # scores become weighted squared errors, summed per tile beside the number of labels that changed
        best = tl.load(weights + out, mask=inside, other=0.0) * tl.maximum(tl.load(squares + out, mask=inside, other=0.0) - 2 * best, 0.0)
        changed = inside
        if AGAIN:
            changed = inside & (tl.load(before + out, mask=inside, other=0) != label)
        place = facts + (group * tl.num_programs(0) + tl.program_id(0)) * 2
        tl.store(place, tl.sum(tl.where(inside, best, 0.0), 0))
        tl.store(place + 1, tl.sum(changed.to(tl.float32), 0))
    tl.store(labels + out, label, mask=inside)
    tl.store(scores + out, best, mask=inside)


@triton.jit
def _round(entries, out, bias, D: tl.constexpr, BD: tl.constexpr):
    # An entry as the products take it, and -1/2 of its squared norm then
    entry, d = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    row = tl.load(entries + entry * D + d, mask=d < D, other=0.0).to(out.dtype.element_ty)
    tl.store(out + entry * D + d, row, mask=d < D)
    row = row.to(tl.float32)
    tl.store(bias + entry, tl.sum(row * row, 0) * -0.5)


@triton.jit
def _gather(
    x, pull, factor, order, bounds, total, mass, entries,
    D: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, KEEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # One entry's members, or a share of them, in sorted order; a row is read once for both weightings, KEEP running sums are joined at the end.
    entry, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(bounds + entry), tl.load(bounds + entry + 1)
    share = tl.cdiv(end - begin, SPLITS)
    begin += split * share
    end = tl.minimum(end, begin + share)
    d, r = tl.arange(0, BD), tl.arange(0, ROWS)
    first = tl.zeros([KEEP, BD], tl.float32)
    second, heavy = first, tl.zeros([ROWS, 1], tl.float32)  # as a column: one layout for all that is read per row, so nothing is read twice
    for at in tl.range(begin, end, ROWS, num_stages=STAGES):
        live = at + r < end
        row = tl.load(order + at + r, mask=live, other=0)
        vector = tl.load(x + row[:, None] * D + d[None, :], mask=live[:, None] & (d[None, :] < D), other=0.0).to(tl.float32)
        weight = tl.load(pull + row, mask=live, other=0.0)[:, None]
        heavy += weight
        first += tl.sum(tl.reshape(weight * vector, [ROWS // KEEP, KEEP, BD]), 0)
        if factor is not None:
            weight *= tl.load(factor + row, mask=live, other=0.0)[:, None]
            second += tl.sum(tl.reshape(weight * vector, [ROWS // KEEP, KEEP, BD]), 0)
    out = split.to(tl.int64) * entries + entry
    tl.store(mass + out, tl.sum(tl.sum(heavy, 1), 0))
    if factor is None:
        tl.store(total + out * D + d, tl.sum(first, 0), mask=d < D)
    else:
        out += split.to(tl.int64) * entries
        tl.store(total + out * D + d, tl.sum(first, 0), mask=d < D)
        tl.store(total + (out + entries) * D + d, tl.sum(second, 0), mask=d < D)


def nearest(x: Tensor, entries: Tensor, bias: Tensor, tile: tuple[int, int, int, int] = TILE) -> tuple[Tensor, Tensor]:
    """Index int32 [G, N] of the entry with the largest x.c + bias and that score, float32 [G, N].

    x [G, N, D] float16, bfloat16 or float32; entries [G, K, D], rounded to the dtype of x; bias [G, K] float32.
    """
    labels, scores, _ = _launch(x, entries, bias, tile)
    return labels, scores


def assess(x: Tensor, entries: Tensor, weights: Tensor, squares: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Labels as `nearest` in L2, errors weight * (squared norm - 2 score) [G, N], and [G, 2]: summed errors, labels unlike `before` (None: all)."""
    (groups, count, width), entries = entries.shape, entries.contiguous()
    rounded, bias = torch.empty_like(entries, dtype=x.dtype), torch.empty(groups, count, device=x.device)
    _round[groups * count,](entries, rounded, bias, D=width, BD=max(16, triton.next_power_of_2(width)), num_warps=1)
    labels, errors, facts = _launch(x, rounded, bias, TILE, weights, squares, before)
    return labels, errors, facts.sum(1, dtype=torch.float64)


def _launch(x, entries, bias, tile, weights=None, squares=None, before=None):
    groups, n, width = x.shape
    count = entries.shape[1]
    x, entries, bias = x.contiguous(), entries.to(x.dtype).contiguous(), bias.contiguous()
    labels, scores = torch.empty(groups, n, dtype=torch.int32, device=x.device), torch.empty(groups, n, device=x.device)
    block, depth = max(16, triton.next_power_of_2(width)), 1
    if block * x.element_size() > WHOLE:
        tile, block = WIDE, 64
        depth = triton.cdiv(width, block)
    rows, columns, warps, stages = tile
    rows, columns = min(rows, max(64, triton.next_power_of_2(n))), min(columns, max(16, triton.next_power_of_2(count)))
    tiles = triton.cdiv(n, rows)
    facts = torch.empty(groups, tiles, 2, device=x.device) if weights is not None else None
    _assign[tiles, groups](
        x, entries, bias, weights, squares, before, labels, scores, facts, n, count,
        D=width, BD=block, DEPTH=depth, EVEN=block == width and count % columns == 0, ASSESS=weights is not None, AGAIN=before is not None,
        BN=rows, BK=columns, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return labels, scores, facts


def sums(x: Tensor, weights: Tensor, labels: Tensor, entries: int, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Summed weight [G, K] and weighted sums [S, G, K, D], float32: S = 1, or 2 with `factor`, the second under weights * factor.

    x [G, N, D] float16, bfloat16 or float32; weights and factor [G, N] float32; labels [G, N] integers in [0, entries).
    """
    mass, total = shares(x, weights, labels, entries, factor)
    return (mass.sum(0), total.sum(0)) if len(mass) > 1 else (mass[0], total[0])


def shares(x: Tensor, weights: Tensor, labels: Tensor, entries: int, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As :func:`sums`, before its parts are added up: each entry's members in P equal shares, [P, G, K] and [P, S, G, K, D]."""
    groups, n, width = x.shape
    several, count = 1 if factor is None else 2, groups * entries
    order, bounds = _members(labels, entries)
    rows, warps, stages, share = GATHER
    splits = max(1, min(16, n // (entries * share)))
    total = torch.empty(splits, several, groups, entries, width, device=x.device)
    mass = torch.empty(splits, groups, entries, device=x.device)
    block = max(16, triton.next_power_of_2(width))
    rows = max(4, min(rows, 8192 // block))
    _gather[count, splits](
        x.contiguous(), weights.contiguous(), None if factor is None else factor.contiguous(), order, bounds, total, mass, count,
        D=width, BD=block, SPLITS=splits, ROWS=rows, KEEP=max(min(rows, warps), min(rows, warps * 256 // block)), STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return mass, total


def _members(labels: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    # Rows of [G * N] in the order of a stable sort by entry, and where in it every entry of every group begins and the last one ends
    count = len(labels) * entries
    half = count // 2  # keys on both sides of zero: almost 2^16 of them fit int16, which sorts in half the time
    kind = torch.int16 if count - half < 2**15 else torch.int32
    key = labels + torch.arange(-half, count - half, entries, device=labels.device, dtype=torch.int32)[:, None]
    ordered, order = torch.sort(key.to(kind).flatten(), stable=True)
    steps = torch.arange(-half, count - half + 1, device=labels.device, dtype=kind)
    return order, torch.searchsorted(ordered, steps, out_int32=len(ordered) < 2**31)
