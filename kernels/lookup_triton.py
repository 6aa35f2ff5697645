"""One query per sequence against residual codes: tiles of keys and values are rebuilt from tables in registers, never in memory.

Obeys `kernels.lookup`. A program serves all queries of one KV head over a share of the tokens; `_merge` joins the shares by
log-sum-exp. Keys coded before RoPE are turned inside the tile: by the tokens' offsets in the tile, the same for every tile, while
the query is turned back by the tile's first position, which moves 64 angles per tile instead of 64 per token.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # tokens rebuilt at once
SHARE = 512  # fewest tokens worth a program of their own
PROGRAMS = 1056  # eight for each of 132 multiprocessors
LIMIT = {"num_warps": 4, "maxnreg": 128}  # four programs to a multiprocessor; more registers mean two


@triton.jit
def _place(head, D: tl.constexpr, PIECE: tl.constexpr):
    # First piece of a head and the channel of it where the head begins; a product, because the compiler finds no 16-byte alignment in a remainder
    if PIECE > D:
        return head // (PIECE // D), head % (PIECE // D) * D
    return head * (D // PIECE), head * 0


@triton.jit
def _rebuild(
    codes, tables, token, seen, stride_code, stride_token, channel: tl.constexpr,
    PARTS: tl.constexpr, W: tl.constexpr, PIECE: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    # [tokens, PARTS, W] channels from `channel` of a head on: the sum of one row per stage
    part, i = tl.arange(0, PARTS), tl.arange(0, W)
    begin = channel + part * W
    piece, column = begin // PIECE, begin % PIECE
    # float16 sums: the tile is float16 for the product anyway. A loop that stays a loop keeps the layout of the loads; unrolled whole,
    # every row would pass through shared memory on its way to the product's layout.
    total = tl.zeros([token.shape[0], PARTS, W], tl.float16)
    for stage in tl.range(0, R, loop_unroll_factor=4 if R >= 8 else 2, num_stages=1):
        code = tl.load(codes + (piece * R + stage)[None, :] * stride_code + token[:, None] * stride_token, mask=seen[:, None], other=0).to(tl.int32)
        row = ((piece * R + stage)[None, :] * K + code) * PIECE
        total += tl.load(tables + row[:, :, None] + column[None, :, None] + i[None, None, :]).to(total.dtype)
    return total


@triton.jit
def _turn(turns):
    # cosine and sine of an angle in turns; Taylor series on a quarter turn, errors below 1e-6
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
def _attend(
    query, key_codes, key_tables, value_codes, value_tables, turns, offsets, base, first, out, lse,
    tokens, share, scale, key_batch, key_stride, key_token, value_batch, value_stride, value_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    KEY_PIECE: tl.constexpr, KEY_STAGES: tl.constexpr, VALUE_PIECE: tl.constexpr, VALUE_STAGES: tl.constexpr,
    ROTARY: tl.constexpr, RAGGED: tl.constexpr, BT: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    batch, head, split = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS, tl.program_id(1)
    HALF: tl.constexpr = D // 2
    KEY_W: tl.constexpr = KEY_PIECE if KEY_PIECE < HALF else HALF
    VALUE_W: tl.constexpr = VALUE_PIECE if VALUE_PIECE < D else D
    t, g, f, d = tl.arange(0, BT), tl.arange(0, BG), tl.arange(0, HALF), tl.arange(0, D)
    key_first, key_within = _place(head, D, KEY_PIECE)
    value_first, value_within = _place(head, D, VALUE_PIECE)
    key_codes += batch * key_batch + key_first * KEY_STAGES * key_stride
    key_tables += key_first.to(tl.int64) * KEY_STAGES * K * KEY_PIECE + key_within
    value_codes += batch * value_batch + value_first * VALUE_STAGES * value_stride
    value_tables += value_first.to(tl.int64) * VALUE_STAGES * K * VALUE_PIECE + value_within
    own = query + (batch * HEADS + head) * GROUP * D + g[:, None] * D + f[None, :]
    low = tl.load(own, mask=g[:, None] < GROUP, other=0.0).to(tl.float32) * scale
    high = tl.load(own + HALF, mask=g[:, None] < GROUP, other=0.0).to(tl.float32) * scale
    if ROTARY:
        once, leap = tl.load(turns + f), tl.load(turns + HALF + f)  # turns per token and per tile
        start = tl.load(base + batch)
        part, i = tl.arange(0, HALF // KEY_W), tl.arange(0, KEY_W)
        around = offsets + t[:, None, None] * HALF + (part * KEY_W)[None, :, None] + i[None, None, :]
    begin = 0
    if RAGGED:
        begin = tl.load(first + batch).to(tl.int32)
    peak = tl.full([BG], float("-inf"), tl.float32)
    mass = tl.zeros([BG], tl.float32)
    total = tl.zeros([BG, D], tl.float32)
    # Pipelining would stage the gathered rows in shared memory and bypass the first-level cache, where the tables live.
    for at in tl.range(split * share, tl.minimum(tokens, split * share + share), BT, num_stages=1):
        token = at + t
        seen = token < tokens
        k_low = _rebuild(key_codes, key_tables, token, seen, key_stride, key_token, 0, HALF // KEY_W, KEY_W, KEY_PIECE, KEY_STAGES, K)
        k_high = _rebuild(key_codes, key_tables, token, seen, key_stride, key_token, HALF, HALF // KEY_W, KEY_W, KEY_PIECE, KEY_STAGES, K)
        q_low, q_high = low, high
        if ROTARY:
            c, s = _turn(((start + at) // BT).to(tl.float32) * leap + ((start + at) % BT).to(tl.float32) * once)
            q_low, q_high = low * c[None, :] + high * s[None, :], high * c[None, :] - low * s[None, :]
            cos, sin = tl.load(around).to(k_low.dtype), tl.load(around + BT * HALF).to(k_low.dtype)
            k_low, k_high = k_low * cos - k_high * sin, k_high * cos + k_low * sin
        k_low = tl.reshape(k_low.to(tl.float16), [BT, HALF])
        k_high = tl.reshape(k_high.to(tl.float16), [BT, HALF])
        score = tl.dot(q_low.to(tl.float16), tl.trans(k_low))
        score = tl.dot(q_high.to(tl.float16), tl.trans(k_high), score)
        visible = seen & (token >= begin)
        score = tl.where(visible[None, :], score, float("-inf"))
        top = tl.maximum(peak, tl.max(score, 1))
        shift = tl.where(top > float("-inf"), top, 0.0)
        weight = tl.exp2((score - shift[:, None]) * 1.4426950408889634)
        fade = tl.exp2((peak - shift) * 1.4426950408889634)
        mass = mass * fade + tl.sum(weight, 1)
        value = _rebuild(value_codes, value_tables, token, seen, value_stride, value_token, 0, D // VALUE_W, VALUE_W, VALUE_PIECE, VALUE_STAGES, K)
        total = total * fade[:, None] + tl.dot(weight.to(tl.float16), tl.reshape(value.to(tl.float16), [BT, D]))
        peak = top
    place = (split * tl.num_programs(0) + tl.program_id(0)) * GROUP + g
    tl.store(out + place[:, None] * D + d[None, :], total / tl.where(mass > 0, mass, 1.0)[:, None], mask=g[:, None] < GROUP)
    tl.store(lse + place, tl.where(mass > 0, peak + tl.log(mass), float("-inf")), mask=g < GROUP)


@triton.jit
def _merge(parts, sums, out, lse, count, rows, D: tl.constexpr, SPLITS: tl.constexpr):
    row, split, d = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, D)
    each = tl.load(sums + split * rows + row, mask=split < count, other=float("-inf"))
    top = tl.max(each, 0)
    weight = tl.exp(each - tl.where(top > float("-inf"), top, 0.0))
    mass = tl.sum(weight, 0)
    total = tl.zeros([D], tl.float32)
    for split in range(count):
        own = tl.exp(tl.load(sums + split * rows + row) - tl.where(top > float("-inf"), top, 0.0))
        total += own * tl.load(parts + (split * rows + row) * D + d)
    tl.store(out + row * D + d, total / tl.where(mass > 0, mass, 1.0))
    tl.store(lse + row, tl.where(mass > 0, top + tl.log(mass), float("-inf")))


@functools.lru_cache(256)
def _rotation(inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    # Turns per token and per tile [2, D/2], and cosines and sines of a tile's offsets [2, TILE, D/2]; cached by the tensor's identity
    once = inv_freq.double() / (2 * torch.pi)
    angles = torch.arange(TILE, device=inv_freq.device)[:, None] * inv_freq.double()
    return torch.stack([once, (once * TILE) % 1]).float(), torch.stack([angles.cos(), angles.sin()]).half()


def attend(
    query: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], tokens: int, scale: float,
    inv_freq: Tensor | None = None, base: Tensor | None = None, first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As :func:`kernels.lookup.attend`; D a power of two from 16 on and pieces that divide D/2 or are multiples of it."""
    batch, queries, dim = query.shape
    (key_codes, key_tables), (value_codes, value_tables) = keys, values
    pieces, stages, entries, piece = key_tables.shape
    heads = pieces * piece // dim
    group = queries // heads
    rows = batch * queries
    splits = max(1, min(triton.cdiv(tokens, SHARE), PROGRAMS // (batch * heads)))
    share = TILE * triton.cdiv(tokens, TILE * splits)
    splits = triton.cdiv(tokens, share)
    parts, sums = torch.empty(splits, rows, dim, device=query.device), torch.empty(splits, rows, device=query.device)
    turns, offsets = (None, None) if inv_freq is None else _rotation(inv_freq)
    _attend[batch * heads, splits](
        query.contiguous(), key_codes, key_tables, value_codes, value_tables, turns, offsets, base, first, parts, sums,
        tokens, share, scale, *key_codes.stride(), *value_codes.stride(),
        HEADS=heads, GROUP=group, D=dim, K=entries, KEY_PIECE=piece, KEY_STAGES=stages,
        VALUE_PIECE=value_tables.shape[3], VALUE_STAGES=value_tables.shape[1],
        ROTARY=inv_freq is not None, RAGGED=first is not None, BT=TILE, BG=max(16, triton.next_power_of_2(group)), **LIMIT,
    )  # fmt: skip
    if splits == 1:
        return parts.view(query.shape), sums.view(batch, queries)
    out, lse = torch.empty(query.shape, device=query.device), torch.empty(batch, queries, device=query.device)
    _merge[rows,](parts, sums, out, lse, splits, rows, D=dim, SPLITS=triton.next_power_of_2(splits), num_warps=1)
    return out, lse
