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
# (members gathered at once, warps, stages, eager, members a program should get on average) for one weighting and for two
GATHER = {1: (64, 2, 3, False, 256), 2: (32, 4, 3, False, 256)}


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
def _gather(
    x, pull, order, bounds, total, mass, entries,
    D: tl.constexpr, BD: tl.constexpr, TWO: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, EAGER: tl.constexpr,
):  # fmt: skip
    # One entry's members, or a share of them, in sorted order; EAGER joins the rows of a block at once, else at the end.
    WEIGHTINGS: tl.constexpr = 2 if TWO else 1
    entry, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(bounds + entry), tl.load(bounds + entry + 1)
    share = tl.cdiv(end - begin, SPLITS)
    begin += split * share
    end = tl.minimum(end, begin + share)
    d, r = tl.arange(0, BD), tl.arange(0, ROWS)
    first = tl.zeros([1 if EAGER else ROWS, BD], tl.float32)
    first_mass = tl.zeros([ROWS], tl.float32)
    second, second_mass = first, first_mass
    for at in tl.range(begin, end, ROWS, num_stages=STAGES):
        live = at + r < end
        row = tl.load(order + at + r, mask=live, other=0)
        vector = tl.load(x + row[:, None] * D + d[None, :], mask=live[:, None] & (d[None, :] < D), other=0.0).to(tl.float32)
        weight = tl.load(pull + row * WEIGHTINGS, mask=live, other=0.0)
        part = weight[:, None] * vector
        first += tl.sum(part, 0)[None, :] if EAGER else part
        first_mass += weight
        if TWO:
            weight = tl.load(pull + row * WEIGHTINGS + 1, mask=live, other=0.0)
            part = weight[:, None] * vector
            second += tl.sum(part, 0)[None, :] if EAGER else part
            second_mass += weight
    out = (split * WEIGHTINGS).to(tl.int64) * entries + entry
    tl.store(total + out * D + d, tl.sum(first, 0), mask=d < D)
    tl.store(mass + out, tl.sum(first_mass, 0))
    if TWO:
        tl.store(total + (out + entries) * D + d, tl.sum(second, 0), mask=d < D)
        tl.store(mass + out + entries, tl.sum(second_mass, 0))


def nearest(x: Tensor, entries: Tensor, bias: Tensor, tile: tuple[int, int, int, int] = TILE) -> tuple[Tensor, Tensor]:
    """Index int32 [G, N] of the entry with the largest x.c + bias and that score, float32 [G, N].

    x [G, N, D] float16, bfloat16 or float32; entries [G, K, D], rounded to the dtype of x; bias [G, K] float32.
    """
    labels, scores, _ = _launch(x, entries, bias, tile)
    return labels, scores


def assess(x: Tensor, entries: Tensor, bias: Tensor, weights: Tensor, squares: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Labels as `nearest`, errors weight * (squared norm - 2 score) [G, N], and [G, 2]: summed errors, labels unlike `before` (None: all)."""
    labels, errors, facts = _launch(x, entries, bias, TILE, weights, squares, before)
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


def sums(x: Tensor, weights: Tensor, labels: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Summed weight [S, G, K] and weighted sums [S, G, K, D], float32, for S = 1 or 2 weightings [S, G, N] of one labelling.

    x [G, N, D] float16, bfloat16 or float32; labels [G, N] integers in [0, entries).
    """
    groups, n, width = x.shape
    several, count = len(weights), groups * entries
    key = labels + torch.arange(0, count, entries, device=x.device, dtype=torch.int32)[:, None]
    key = key.to(torch.int16 if count < 2**15 else torch.int32)
    ordered, order = torch.sort(key.flatten(), stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(count + 1, device=x.device, dtype=key.dtype))
    rows, warps, stages, eager, share = GATHER[several]
    splits = max(1, min(16, n // (entries * share)))
    total = torch.empty(splits, several, count, width, device=x.device)
    mass = torch.empty(splits, several, count, device=x.device)
    block = max(16, triton.next_power_of_2(width))
    _gather[count, splits](
        x.contiguous(), weights.movedim(0, -1).contiguous(), order, bounds, total, mass, count,
        D=width, BD=block, TWO=several == 2, SPLITS=splits, ROWS=max(4, min(rows, 8192 // block)), STAGES=stages, EAGER=eager, num_warps=warps,
    )  # fmt: skip
    if splits > 1:
        mass, total = mass.sum(0), total.sum(0)
    return mass.view(several, groups, entries), total.view(several, groups, entries, width)
