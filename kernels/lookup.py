"""One query per sequence against residual codes: attention over keys and values that are sums of table rows.

Keys may be coded before RoPE; they are then rotated to their positions, pair (i, i + D/2) by position * inv_freq[i]. This file defines;
two kernels obey: long sequences go to `kernels.lookup_direct_triton` (rows go from the first-level cache straight into the products' operands), short ones,
and what it does not take, to `kernels.lookup_bound_triton` (tiles rebuilt on the way through shared memory). How fast: NOTES.md.
It costs scores, 4 bytes per token and query head, and for keys before RoPE queries, 2 D bytes per 128 tokens and query head, once for all layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import rvq
from kernels.attention import Part
from kernels.attention import attend as dense

LONG = 16384  # tokens from which the direct kernel is the faster one on an H200: at 8,192 it is 4 to 20 % slower, at 32,768 up to 28 % faster
NARROWEST = 32  # channels of a head that the kernels read: half of them is the least a product takes; narrower heads are read as defined


class Coded(NamedTuple):
    """T tokens of one layer's keys or values, all heads; a head's channels are M pieces, or a part of one piece."""

    codes: Tensor  # [B, S, M * R / S, T] uint8 in any strides, a piece's stages side by side; S is 1 or the number of heads
    tables: Tensor  # [M, R, K, D'] of a floating dtype; one table for all pieces has stride 0 over M
    sizes: Tensor | None = None  # [B, H, T] what the sum of rows of a head and token is multiplied by
    strided: bool = False  # channel c of a head is column c // n of its piece c % n, n pieces; else pieces are consecutive channels


def rebuild(coded: Coded, heads: int, tokens: int) -> Tensor:
    """The first `tokens` tokens, float32 [B, H, T, D]."""
    pieces, stages, _, width = coded.tables.shape
    batch = coded.codes.shape[0]
    codes = coded.codes[..., :tokens].flatten(1, 2).unflatten(1, (pieces, stages)).permute(1, 0, 3, 2)  # [M, B, T, R]
    x = rvq.decode(codes.flatten(1, 2), coded.tables).view(pieces, batch, tokens, width)
    x = x.permute(1, 2, 0, 3).reshape(batch, tokens, heads, -1).transpose(1, 2)
    if coded.strided:
        x = x.unflatten(-1, (-1, width)).mT.flatten(-2)
    return x if coded.sizes is None else x * coded.sizes[:, :, :tokens, None].float()


def rotate(x: Tensor, inv_freq: Tensor, base: Tensor) -> Tensor:
    """x [B, H, T, D] turned to positions base [B] + 0, 1, ...; inv_freq [D/2] radians per token."""
    positions = base[:, None].double() + torch.arange(x.shape[2], device=x.device)
    angle = (positions[:, None, :, None] * inv_freq.double()).float()
    low, high = x.chunk(2, -1)
    return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], -1)


def attend(query: Tensor, keys: Coded, values: Coded, tokens: int, scale: float, inv_freq: Tensor | None = None, base: Tensor | None = None, first: Tensor | None = None) -> Part:
    """Attention of query [B, Hq, D] over the first `tokens` tokens; query head h reads KV head h // (Hq // H).

    inv_freq [D/2] and base [B] (position of token 0, integers): given for keys coded before RoPE. first [B]: first visible token.
    """
    if query.is_cuda and query.shape[2] >= NARROWEST:
        from kernels import lookup_bound_triton, lookup_direct_triton

        return (lookup_direct_triton if tokens >= LONG else lookup_bound_triton).attend(query, keys, values, tokens, scale, inv_freq, base, first)
    heads = keys.tables.shape[0] * keys.tables.shape[3] // query.shape[2]
    key, value = (rebuild(coded, heads, tokens) for coded in (keys, values))
    if inv_freq is not None:
        key = rotate(key, inv_freq, base)
    return dense(query, key, value, scale, first)
