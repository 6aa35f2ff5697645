"""Greedy residual encoding on CUDA tensors: all stages of a tile of tokens in one kernel, the residual stays in registers.

Obeys `kernels.rvq`. Products take float16 operands and accumulate in float32; the residual goes in as the sum of two float16 parts,
which keeps 22 of its bits, and stored tables are float16, so codes are those of float32 arithmetic except at ties within rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rvq import bias_of

# (tokens, entries, warps, stages) of a tile by the widest piece it serves; measured on an H200 (kernels/NOTES.md)
TILES = {64: (128, 64, 4, 3), 128: (64, 128, 4, 2), 256: (64, 64, 8, 2)}


@triton.jit
def _encode(
    x, tables, bias, codes, n, stride_group, stride_row,
    GROUPS: tl.constexpr, STAGES: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    d, columns = tl.arange(0, BD), tl.arange(0, BK)
    real = d < D
    rest = tl.load(x + group * stride_group + rows[:, None] * stride_row + d[None, :], mask=(rows[:, None] < n) & real[None, :], other=0.0)
    rest = rest.to(tl.float32)
    for stage in range(STAGES):
        table = tables + (group * STAGES + stage) * K * D
        offsets = bias + (group * STAGES + stage) * K
        high = rest.to(tl.float16)
        low = (rest - high.to(tl.float32)).to(tl.float16)
        best, label = tl.full([BN], float("-inf"), tl.float32), tl.zeros([BN], tl.int32)
        for first in tl.range(0, K, BK, num_stages=DEPTH):
            at = first + columns
            some = tl.load(table + at[None, :] * D + d[:, None], mask=(at[None, :] < K) & real[:, None], other=0.0).to(tl.float16)
            score = tl.dot(high, some)
            if SPLIT:
                score = tl.dot(low, some, score)
            score += tl.load(offsets + at, mask=at < K, other=float("-inf"))[None, :]
            top, place = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=False)
            label = tl.where(top > best, first + place, label)
            best = tl.maximum(best, top)
        tl.store(codes + (rows * GROUPS + group) * STAGES + stage, label.to(codes.dtype.element_ty), mask=rows < n)
        rest -= tl.load(table + label[:, None] * D + d[None, :], mask=real[None, :], other=0.0).to(tl.float32)


def encode(x: Tensor, codebooks: Tensor, split: bool = True, tile: tuple[int, int, int, int] | None = None) -> Tensor:
    """Codes [G, N, R] of x [G, N, D] under codebooks [G, R, K, D] float16 or float8: uint8 for K up to 256, else int32; their memory is [N, G, R].

    x in any float dtype and any strides. `split` False drops the low half of the residual in the products: a third faster, .2 % other codes.
    """
    groups, stages, entries, width = codebooks.shape
    n = x.shape[1]
    if x.stride(2) != 1:
        x = x.contiguous()
    bias = bias_of(codebooks)
    codes = torch.empty(n, groups, stages, dtype=torch.uint8 if entries <= 256 else torch.int32, device=x.device)
    block = max(16, triton.next_power_of_2(width))
    rows, columns, warps, depth = tile or TILES[max(64, block)]
    rows, columns = min(rows, max(16, triton.next_power_of_2(n))), min(columns, max(16, triton.next_power_of_2(entries)))
    _encode[triton.cdiv(n, rows), groups](
        x, codebooks.contiguous(), bias, codes, n, x.stride(0), x.stride(1),
        GROUPS=groups, STAGES=stages, K=entries, D=width, BD=block, BN=rows, BK=columns, DEPTH=depth, SPLIT=split, num_warps=warps,
    )  # fmt: skip
    return codes.transpose(0, 1)
