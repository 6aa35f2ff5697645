"""Residual encoding with a beam on CUDA tensors: the best partial sums of a tile of tokens stay in registers through all stages.

Obeys `kernels.rvq`. A stage scores every entry for every partial sum with tensor cores and keeps the best `beam` of all by as many
maxima; which sum each came from is written beside its code, and a second kernel follows the winner back. Scores are those of
`kernels.rvq_triton`: float16 operands, the residual in two parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rvq import bias_of

ROWS = 64  # partial sums of a tile; with 256 entries their scores take 64 registers of each of 256 threads
ENTRIES, BEAM, PIECE = 256, 8, 128  # more do not fit beside each other


def serves(codebooks: Tensor, beam: int) -> bool:
    """Whether a beam of this width over codebooks [G, R, K, D] fits; torch takes wider ones."""
    return beam <= BEAM and codebooks.shape[2] <= ENTRIES and codebooks.shape[3] <= PIECE


@triton.jit
def _search(
    x, tables, bias, codes, parents, n, stride_group, stride_row,
    GROUPS: tl.constexpr, STAGES: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, SLOTS: tl.constexpr, BEAM: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    token, d, k, slot = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BK), tl.arange(0, SLOTS)
    flat = tl.arange(0, SLOTS * BK)
    rows = tl.reshape(tl.broadcast_to(token[:, None], [BN, SLOTS]), [BN * SLOTS])
    real = d < D
    rest = tl.load(x + group * stride_group + rows[:, None] * stride_row + d[None, :], mask=(rows[:, None] < n) & real[None, :], other=0.0).to(tl.float32)
    sofar = tl.where(slot[None, :] == 0, 0.0, float("-inf")) + tl.zeros([BN, SLOTS], tl.float32)  # all begin equal: only one may count
    for stage in range(STAGES):
        table = tables + (group * STAGES + stage) * K * D
        some = tl.load(table + k[None, :] * D + d[:, None], mask=(k[None, :] < K) & real[:, None], other=0.0).to(tl.float16)
        high = rest.to(tl.float16)
        score = tl.dot(high, some)
        score = tl.dot((rest - high.to(tl.float32)).to(tl.float16), some, score)
        score += tl.load(bias + (group * STAGES + stage) * K + k, mask=k < K, other=float("-inf"))[None, :]
        left = tl.reshape(tl.reshape(score, [BN, SLOTS, BK]) + sofar[:, :, None], [BN, SLOTS * BK])
        parent, label = tl.zeros([BN, SLOTS], tl.int32), tl.zeros([BN, SLOTS], tl.int32)
        for rank in tl.static_range(BEAM):
            top, place = tl.max(left, 1, return_indices=True)
            sofar = tl.where(slot[None, :] == rank, top[:, None], sofar)
            parent = tl.where(slot[None, :] == rank, (place // BK)[:, None], parent)
            label = tl.where(slot[None, :] == rank, (place % BK)[:, None], label)
            left = tl.where(flat[None, :] == place[:, None], float("-inf"), left)
        label = tl.minimum(label, K - 1)  # an empty slot, where there are fewer sums than slots, names any entry and never wins
        at = ((group * STAGES + stage) * n + token)[:, None] * SLOTS + slot[None, :]
        tl.store(codes + at, label.to(tl.uint8), mask=token[:, None] < n)
        tl.store(parents + at, parent.to(tl.uint8), mask=token[:, None] < n)
        chosen = tl.broadcast_to(parent[:, :, None], [BN, SLOTS, BD])
        rest = tl.reshape(tl.gather(tl.reshape(rest, [BN, SLOTS, BD]), chosen, 1), [BN * SLOTS, BD])
        label = tl.reshape(label, [BN * SLOTS])
        rest -= tl.load(table + label[:, None] * D + d[None, :], mask=real[None, :], other=0.0).to(tl.float32)


@triton.jit
def _follow(codes, parents, out, n, GROUPS: tl.constexpr, STAGES: tl.constexpr, SLOTS: tl.constexpr, BN: tl.constexpr):
    group, token = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    slot = tl.zeros([BN], tl.int32)
    for back in range(STAGES):
        stage = STAGES - 1 - back
        at = ((group * STAGES + stage) * n + token) * SLOTS + slot
        code = tl.load(codes + at, mask=token < n, other=0)
        tl.store(out + (token * GROUPS + group) * STAGES + stage, code, mask=token < n)
        slot = tl.load(parents + at, mask=token < n, other=0).to(tl.int32)


def encode(x: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    """Codes [G, N, R] uint8 of x [G, N, D] under codebooks [G, R, K, D] of a floating dtype, K at most 256, beam at most 8; their memory is [N, G, R]."""
    groups, stages, entries, width = codebooks.shape
    n = x.shape[1]
    if x.stride(2) != 1:
        x = x.contiguous()
    bias = bias_of(codebooks)
    slots = triton.next_power_of_2(beam)
    codes, parents = (torch.empty(groups, stages, n, slots, dtype=torch.uint8, device=x.device) for _ in range(2))
    tile = ROWS // slots
    _search[triton.cdiv(n, tile), groups](
        x, codebooks.contiguous(), bias, codes, parents, n, x.stride(0), x.stride(1), GROUPS=groups, STAGES=stages, K=entries,
        BK=max(16, triton.next_power_of_2(entries)), D=width, BD=max(16, triton.next_power_of_2(width)), BN=tile, SLOTS=slots, BEAM=beam, num_warps=8, num_stages=2,
    )  # fmt: skip
    out = torch.empty(n, groups, stages, dtype=torch.uint8, device=x.device)
    _follow[triton.cdiv(n, 128), groups](codes, parents, out, n, GROUPS=groups, STAGES=stages, SLOTS=slots, BN=128)
    return out.transpose(0, 1)
