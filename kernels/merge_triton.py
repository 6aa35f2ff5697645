"""Triton: from the splits of decode attention over pages to its output. Neighbours are folded while they are many, the rest merged and turned back.

Latency alone: both kernels ask for all they need at once, in many programs. Outputs [B, H, splits, G, DIM] are unnormalized, statistics
[B, H, splits, 2, G] hold a maximum (base 2) and a mass. A split without mass has the maximum -inf, the mass 0, and perhaps no output. All float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DIRECT = 64  # most splits that are merged unfolded
FOLDED = 32  # most that folding leaves
TILE = 32  # channels of the output that a program turns back
WARPS = 8  # such a program's
ROWS = 8  # splits that a warp folds
LIMIT = {"maxnreg": 128}  # without a limit the assembler saves registers: it waits for one row before it asks for the next


@triton.jit
def _weighted(out, stat, first, splits, G: tl.constexpr, DIM: tl.constexpr, DPAD: tl.constexpr, MANY: tl.constexpr, WHOLE: tl.constexpr):
    """Sum [DPAD], mass and maximum of splits first, ..., first + MANY - 1 of one query. WHOLE: every split has an output."""
    split, chan = first + tl.arange(0, MANY), tl.arange(0, DPAD)
    there = split < splits
    tops = tl.load(stat + split * (2 * G), mask=there, other=float("-inf"))
    masses = tl.load(stat + split * (2 * G) + G, mask=there, other=0)
    if not WHOLE:
        there = tops > float("-inf")
    x = tl.load(out + split[:, None] * (G * DIM) + chan[None, :], mask=there[:, None] & (chan < DIM)[None, :], other=0)
    peak = tl.max(tops, 0)
    weight = tl.exp2(tops - tl.where(peak == float("-inf"), 0.0, peak))
    return tl.sum(x * weight[:, None], 0), tl.sum(weight * masses, 0), peak


@triton.jit
def fold_splits(
    out, stat, folded, folded_stat, splits,
    GROUP: tl.constexpr, G: tl.constexpr, DIM: tl.constexpr, DPAD: tl.constexpr, STEP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """STEP neighbouring splits to one: folded [B, H, chunks, GROUP, DIM], all of it, and its statistics [B, H, chunks, 2, GROUP]."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place, g, chunk = tl.program_id(0).to(tl.int64) // GROUP, tl.program_id(0) % GROUP, tl.program_id(1)
    total, mass, peak = _weighted(out + (place * splits * G + g) * DIM, stat + place * splits * 2 * G + g, chunk * STEP, splits, G, DIM, DPAD, STEP, False)
    chan, row, at = tl.arange(0, DPAD)[None, :], tl.arange(0, STEP)[:, None], place * tl.num_programs(1) + chunk
    tl.store(folded + (at * GROUP + g) * DIM + chan + row * 0, total[None, :], mask=(chan < DIM) & (row == 0))  # from where the sums lie
    tl.store(folded_stat + at * 2 * GROUP + g, peak)
    tl.store(folded_stat + (at * 2 + 1) * GROUP + g, mass)


@triton.jit
def merge_splits(
    out, stat, matrix, mean, output, lse, splits, head_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, DIM: tl.constexpr, DPAD: tl.constexpr, TILE: tl.constexpr, ALL: tl.constexpr,
    WHOLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """output [B, H GROUP, D], of any type, = weighted mean of the splits @ rotation + mean; lse [B, H GROUP], natural logarithm; see :func:`merge`."""
    query, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place, g = query // GROUP, query % GROUP
    head = place % HEADS
    c, d = tl.arange(0, DPAD), block * TILE + tl.arange(0, TILE)
    r = tl.load(matrix + head * head_stride + d[:, None] * DIM + c[None, :], mask=(d < DIM)[:, None] & (c < DIM)[None, :], other=0)
    centre = tl.load(mean + head * DIM + d, mask=d < DIM, other=0)
    if EARLY:  # the matrix and the mean are none of the kernel's before
        tl.extra.cuda.gdc_wait()
    total, mass, peak = _weighted(out + (place * splits * G + g) * DIM, stat + place * splits * 2 * G + g, 0, splits, G, DIM, DPAD, ALL, WHOLE)
    some = tl.where(mass == 0, 1.0, mass)
    tl.store(output + query * DIM + d, tl.sum(r * total[None, :], 1) / some + centre, mask=d < DIM)
    if block == 0:
        tl.store(lse + query, tl.where(mass == 0, float("-inf"), (peak + tl.log2(some)) * 0.6931471805599453))


def merge(out: Tensor, stat: Tensor, group: int, back: Tensor, mean: Tensor, early: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(output [B, H group, D], lse [B, H group] natural logarithm) of splits out [B, H, splits, G, D] and stat [B, H, splits, 2, G], G >= group.

    back [H or 1, D, D]: the values' rotation transposed; mean [H, D]. A query without mass gets the mean and -inf.
    early: see :func:`kernels.backend.early`; the kernels ahead of it must wait likewise. dtype: of the output.
    """
    batch, heads, splits, wide, dim = out.shape
    queries, pad, whole = batch * heads * group, 1 << (dim - 1).bit_length(), splits > DIRECT
    launch = LIMIT | ({"launch_pdl": True} if early else {})
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=out.device)  # noqa: E731
    if whole:
        step = 1 << (-(-splits // FOLDED) - 1).bit_length()
        chunks = -(-splits // step)
        folded, folded_stat = new(batch, heads, chunks, group, dim), new(batch, heads, chunks, 2, group)
        fold_splits[(queries, chunks)](out, stat, folded, folded_stat, splits, group, wide, dim, pad, step, early, num_warps=min(8, max(1, step // ROWS)), **launch)
        out, stat, splits, wide = folded, folded_stat, chunks, group
    output, lse = new(batch, heads * group, dim, dtype=dtype), new(batch, heads * group)
    stride = back.stride(0) if len(back) > 1 else 0  # heads may share a rotation
    every = max(8, 1 << (splits - 1).bit_length())
    merge_splits[(queries, -(-dim // TILE))](out, stat, back, mean, output, lse, splits, stride, heads, group, wide, dim, pad, TILE, every, whole, early, num_warps=WARPS, **launch)
    return output, lse
