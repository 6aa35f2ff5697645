"""What both decode kernels over residual codes share: where a head's codes and rows lie, turning angles, merging shares of the tokens.

Table rows are read from global memory with plain 16-byte loads, so they live in the first-level cache: no staging through shared
memory, which `cp.async` would do past that cache. A sum of rows is float16, as the product that follows wants it; for float32 queries sums and
products are float32 (:func:`kind`), because a model in float32 asks for its digits and not for speed.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MERGED = 32  # channels of a row that a program of `merge_shares` joins


@triton.jit
def seat(
    codes, tables, batch, head, stride_batch, stride_strip, stride_code,
    D: tl.constexpr, PIECE: tl.constexpr, R: tl.constexpr, K: tl.constexpr, STRIPS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Pointers to the first code and the first table row of a head. Its channel in a wide piece is a product: in a remainder the compiler finds no alignment."""
    if PIECE > D:
        piece, within = head // (PIECE // D), head % (PIECE // D) * D
    else:
        piece, within = head * (D // PIECE), head * 0
    codes += batch.to(tl.int64) * stride_batch
    if STRIPS:
        codes += head.to(tl.int64) * stride_strip
    else:
        codes += piece * R * stride_code
    if SHARED:
        return codes, tables
    return codes, tables + (piece.to(tl.int64) * (R * K * PIECE) + within)


@triton.jit
def turn(turns):
    """Cosine and sine of an angle in turns; Taylor series on a quarter turn, errors below 1e-6."""
    turns -= tl.floor(turns + 0.5)
    quarter = tl.floor(turns * 4 + 0.5)
    x = (turns - quarter * 0.25) * 6.283185307179586
    y = x * x
    c = 1 + y * (-0.5 + y * (1 / 24 + y * (-1 / 720 + y / 40320)))
    s = x * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y / 362880))))
    odd = tl.abs(quarter) == 1
    cos, sin = tl.where(odd, -s * quarter, c), tl.where(odd, c * quarter, s)
    flip = tl.abs(quarter) == 2
    return tl.where(flip, -cos, cos), tl.where(flip, -sin, sin)


@triton.jit
def merge_shares(parts, sums, out, lse, count, rows, D: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """WIDE channels of one row of `out` [rows, D]: parts [GROUPS, count, rows, D] added over groups of stages and joined over shares by log-sum-exp, sums [count, rows]."""
    row, split, d = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    each = tl.load(sums + split * rows + row, mask=split < count, other=float("-inf"))
    top = tl.max(each, 0)
    base = tl.where(top > float("-inf"), top, 0.0)
    mass = tl.sum(tl.exp(each - base), 0)
    total = tl.zeros([WIDE], tl.float32)
    for begin in range(0, count, BLOCK):
        some = begin + tl.arange(0, BLOCK)
        own = tl.exp(tl.load(sums + some * rows + row, mask=some < count, other=float("-inf")) - base)
        for group in tl.static_range(GROUPS):
            part = tl.load(parts + ((group * count + some[:, None]) * rows + row) * D + d[None, :], mask=some[:, None] < count, other=0.0)
            total += tl.sum(own[:, None] * part, 0)
    tl.store(out + row * D + d, total / tl.where(mass > 0, mass, 1.0))
    if tl.program_id(1) == 0:
        tl.store(lse + row, tl.where(mass > 0, top + tl.log(mass), float("-inf")))


def merge(parts: Tensor, sums: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of `merge_shares`; out [B, Hq, D] is written, the log-sum-exp [B, Hq] is new. All float32."""
    groups, splits, rows, dim = parts.shape
    lse = torch.empty(out.shape[:2], device=out.device)
    merge_shares[rows, dim // MERGED](parts, sums, out, lse, splits, rows, D=dim, SPLITS=triton.next_power_of_2(splits), GROUPS=groups, BLOCK=32, WIDE=MERGED, num_warps=1)
    return out, lse


@functools.lru_cache(256)
def halves(dim: int, piece: int, device: torch.device) -> Tensor:
    """Channels [dim] in the order of strided pieces (channel c in piece c % (dim / piece)): the pieces' first halves, then their second."""
    order = torch.arange(dim, device=device).view(2, piece // 2, dim // piece)
    return order.transpose(1, 2).flatten()


def packed(codes: Tensor) -> bool:
    """Whether the codes [B, S, n, T] of a token lie side by side from an aligned address on, so that several can be read as one word."""
    return codes.stride(2) == 1 and codes.data_ptr() % 4 == 0


def kind(query: Tensor) -> tl.dtype:
    """The type in which tiles are summed and multiplied."""
    return tl.float32 if query.dtype == torch.float32 else tl.float16


@functools.lru_cache(256)
def rotation(inv_freq: Tensor, piece: int | None, tile: int, exact: bool) -> tuple[Tensor, Tensor]:
    """Turns per token and per tile [2, D/2], and cosines and sines of a tile's offsets [2, tile, D/2], in the order of `halves` if `piece` is given.

    exact: the latter in float32, else in float16.
    """
    if piece:
        inv_freq = inv_freq[halves(2 * len(inv_freq), piece, inv_freq.device)[: len(inv_freq)]]
    once = inv_freq.double() / (2 * torch.pi)
    angles = torch.arange(tile, device=inv_freq.device)[:, None] * inv_freq.double()
    return torch.stack([once, (once * tile) % 1]).float(), torch.stack([angles.cos(), angles.sin()]).to(torch.float32 if exact else torch.float16)


class Layout(NamedTuple):
    """Compile-time numbers of one tensor's pieces, as `seat` and the kernels take them."""

    PIECE: int
    R: int
    K: int
    STRIPS: bool
    SHARED: bool
    PARTS: int  # pieces, or parts of one, of half a head for keys, of a head for values
    W: int  # channels of a part
    STEP: int  # channels from one part to the next: W, or a piece where keys are strided
    HIGH: int  # channel where the second half begins; unused for values


def layout(coded, dim: int, halved: bool) -> Layout:
    """Layout of `coded` (:class:`kernels.lookup.Coded`) for heads of `dim`; `halved` for keys, whose two halves are rebuilt apart."""
    _, stages, entries, piece = coded.tables.shape
    span = dim // 2 if halved else dim
    kept = piece, stages, entries, coded.codes.shape[1] > 1, coded.tables.shape[0] > 1 and coded.tables.stride(0) == 0
    if coded.strided:
        return Layout(*kept, dim // piece, piece // 2, piece, piece // 2)
    width = min(piece, span)
    return Layout(*kept, span // width, width, width, span)


def strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    """Strides of x, or `count` zeros for what is not given."""
    return (0,) * count if x is None else x.stride()
