"""One query per sequence against residual codes: tiles of keys and values are rebuilt from tables in registers, never in memory.

Obeys `kernels.lookup`. A program serves all queries of one KV head over a share of the tokens. Keys coded before RoPE are turned inside
the tile: by the tokens' offsets in the tile, the same for every tile, while the query is turned back by the tile's first position, which
moves 64 angles per tile instead of 64 per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.lookup_rows_triton import halves, kind, laid, layout, merge, rebuild, rotation, seat, strides, turned

TILE = 64  # tokens rebuilt at once
SHARE = 512  # fewest tokens worth a program of their own
PROGRAMS = 1056  # eight for each of 132 multiprocessors
LIMIT = {"num_warps": 4, "maxnreg": 128}  # four programs to a multiprocessor; more registers mean two


@triton.jit
def _attend(
    query, key_codes, key_tables, key_sizes, value_codes, value_tables, value_sizes, turns, offsets, base, first, out, lse, tokens, share, scale,
    key_batch, key_strip, key_stride, key_token, value_batch, value_strip, value_stride, value_token,
    key_size_batch, key_size_head, key_size_token, value_size_batch, value_size_head, value_size_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    KEY_PIECE: tl.constexpr, KEY_R: tl.constexpr, KEY_K: tl.constexpr, KEY_STRIPS: tl.constexpr, KEY_SHARED: tl.constexpr,
    KEY_PARTS: tl.constexpr, KEY_W: tl.constexpr, KEY_STEP: tl.constexpr, KEY_HIGH: tl.constexpr,
    VALUE_PIECE: tl.constexpr, VALUE_R: tl.constexpr, VALUE_K: tl.constexpr, VALUE_STRIPS: tl.constexpr, VALUE_SHARED: tl.constexpr,
    VALUE_PARTS: tl.constexpr, VALUE_W: tl.constexpr, VALUE_STEP: tl.constexpr, VALUE_HIGH: tl.constexpr,
    ROTARY: tl.constexpr, RAGGED: tl.constexpr, BT: tl.constexpr, BG: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    batch, head, split = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS, tl.program_id(1)
    HALF: tl.constexpr = D // 2
    t, g, f, d = tl.arange(0, BT), tl.arange(0, BG), tl.arange(0, HALF), tl.arange(0, D)
    key_codes, key_tables = seat(key_codes, key_tables, batch, head, key_batch, key_strip, key_stride, D, KEY_PIECE, KEY_R, KEY_K, KEY_STRIPS, KEY_SHARED)
    value_codes, value_tables = seat(value_codes, value_tables, batch, head, value_batch, value_strip, value_stride, D, VALUE_PIECE, VALUE_R, VALUE_K, VALUE_STRIPS, VALUE_SHARED)
    own = query + (batch * HEADS + head) * GROUP * D + g[:, None] * D + f[None, :]
    low = tl.load(own, mask=g[:, None] < GROUP, other=0.0).to(tl.float32) * scale
    high = tl.load(own + HALF, mask=g[:, None] < GROUP, other=0.0).to(tl.float32) * scale
    if ROTARY:
        start = tl.load(base + batch)
        part, i = tl.arange(0, KEY_PARTS), tl.arange(0, KEY_W)
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
        k_low = rebuild(key_codes, key_tables, token, seen, key_stride, key_token, 0, KEY_PARTS, KEY_W, KEY_STEP, KEY_PIECE, KEY_R, KEY_K, KEY_SHARED, KIND)
        k_high = rebuild(key_codes, key_tables, token, seen, key_stride, key_token, KEY_HIGH, KEY_PARTS, KEY_W, KEY_STEP, KEY_PIECE, KEY_R, KEY_K, KEY_SHARED, KIND)
        q_low, q_high = low, high
        if ROTARY:
            q_low, q_high = turned(low, high, turns, start + at, BT, f, HALF)
            cos, sin = tl.load(around), tl.load(around + BT * HALF)
            k_low, k_high = k_low * cos - k_high * sin, k_high * cos + k_low * sin
        score = tl.dot(q_low.to(KIND), tl.trans(tl.reshape(k_low, [BT, HALF])), input_precision="ieee")
        score = tl.dot(q_high.to(KIND), tl.trans(tl.reshape(k_high, [BT, HALF])), score, input_precision="ieee")
        if key_sizes is not None:
            size = tl.load(key_sizes + batch.to(tl.int64) * key_size_batch + head * key_size_head + token * key_size_token, mask=seen, other=0.0)
            score *= size.to(tl.float32)[None, :]
        score = tl.where((seen & (token >= begin))[None, :], score, float("-inf"))
        top = tl.maximum(peak, tl.max(score, 1))
        shift = tl.where(top > float("-inf"), top, 0.0)
        weight = tl.exp2((score - shift[:, None]) * 1.4426950408889634)
        fade = tl.exp2((peak - shift) * 1.4426950408889634)
        mass = mass * fade + tl.sum(weight, 1)
        if value_sizes is not None:
            size = tl.load(value_sizes + batch.to(tl.int64) * value_size_batch + head * value_size_head + token * value_size_token, mask=seen, other=0.0)
            weight *= size.to(tl.float32)[None, :]
        value = rebuild(value_codes, value_tables, token, seen, value_stride, value_token, 0, VALUE_PARTS, VALUE_W, VALUE_STEP, VALUE_PIECE, VALUE_R, VALUE_K, VALUE_SHARED, KIND)
        total = total * fade[:, None] + tl.dot(weight.to(KIND), tl.reshape(value, [BT, D]), input_precision="ieee")
        peak = top
    place = (split * tl.num_programs(0) + tl.program_id(0)) * GROUP + g
    tl.store(out + place[:, None] * D + d[None, :], total / tl.where(mass > 0, mass, 1.0)[:, None], mask=g[:, None] < GROUP)
    tl.store(lse + place, tl.where(mass > 0, peak + tl.log(mass), float("-inf")), mask=g < GROUP)


def attend(
    query: Tensor, keys, values, tokens: int, scale: float, inv_freq: Tensor | None = None, base: Tensor | None = None, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`kernels.lookup.attend`; D a power of two from 32 on, pieces that divide D/2 or are multiples of it, values not strided."""
    batch, queries, dim = query.shape
    heads = keys.tables.shape[0] * keys.tables.shape[3] // dim
    group = queries // heads
    rows = batch * queries
    splits = max(1, min(triton.cdiv(tokens, SHARE), PROGRAMS // (batch * heads)))
    share = TILE * triton.cdiv(tokens, TILE * splits)
    splits = triton.cdiv(tokens, share)
    parts, sums = torch.empty(1, splits, rows, dim, device=query.device), torch.empty(splits, rows, device=query.device)
    piece = keys.tables.shape[3] if keys.strided else None
    query = query[..., halves(dim, piece, query.device)] if piece else query.contiguous()
    turns, offsets = (None, None) if inv_freq is None else rotation(inv_freq, piece, TILE, query.dtype == torch.float32)
    _attend[batch * heads, splits](
        query, keys.codes, keys.tables, keys.sizes, values.codes, values.tables, values.sizes, turns, offsets, base, first, parts, sums,
        tokens, share, scale, *keys.codes.stride(), *values.codes.stride(), *strides(keys.sizes, 3), *strides(values.sizes, 3),
        HEADS=heads, GROUP=group, D=dim, **laid("KEY", layout(keys, dim, True)), **laid("VALUE", layout(values, dim, False)),
        ROTARY=inv_freq is not None, RAGGED=first is not None, BT=TILE, BG=max(16, triton.next_power_of_2(group)), KIND=kind(query), **LIMIT,
    )  # fmt: skip
    if splits == 1:
        return parts.view(batch, queries, dim), sums.view(batch, queries)
    return merge(parts, sums, torch.empty(batch, queries, dim, device=query.device))
