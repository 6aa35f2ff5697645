"""Attention over residual codes by programs that stay with one share of the tables, small enough for the first-level cache.

Obeys `kernels.lookup`, divides the work as `kernels.lookup_shares_triton` says, and serves what `kernels.lookup_direct_triton` does not take. A
program of `_scores` rebuilds its share of the keys of one KV head for a stretch of tokens and writes partial scores, `_join` adds them up, and a
program of `_values` gathers its share of the value rows for a stretch. Shares of channels are disjoint, shares of stages are added by the merge,
stretches of tokens are joined by log-sum-exp. Partial scores are float32: 4 bytes per key share, token and query head. Keys after RoPE need no
rows (`kernels.lookup_sums_triton`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import lookup_shares_triton, lookup_sums_triton
from kernels.lookup_rows_triton import halves, kind, layout, merge, packed, rotation, seat, strides, turn
from kernels.lookup_shares_triton import LIMIT, TWICE, divide, spread, task

TILE = 64  # tokens rebuilt at once
JOINED = 1024  # tokens that a program of `_join` adds up


@triton.jit
def _words(
    codes, token, tokens, stride_code, stride_token, channel: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
    PIECE: tl.constexpr, R: tl.constexpr, DEPTH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    # Codes of DEPTH stages in the bytes of a word, [tokens, PARTS]; asked for a tile ahead, because they come from memory
    piece = (channel + tl.arange(0, PARTS) * STEP) // PIECE
    place = codes + (piece * R)[None, :] * stride_code + token[:, None] * stride_token
    seen = (token < tokens)[:, None]
    if PACKED and DEPTH == 4:
        return tl.load(place.to(tl.pointer_type(tl.int32), bitcast=True), mask=seen, other=0)
    if PACKED and DEPTH == 2:
        return tl.load(place.to(tl.pointer_type(tl.int16), bitcast=True), mask=seen, other=0).to(tl.int32)
    word = tl.zeros([token.shape[0], PARTS], tl.int32)
    for stage in tl.static_range(DEPTH):
        word |= tl.load(place + stage * stride_code, mask=seen, other=0).to(tl.int32) << (8 * stage)
    return word


@triton.jit
def _rebuild(
    word, tables, channel: tl.constexpr, PARTS: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr,
    PIECE: tl.constexpr, R: tl.constexpr, DEPTH: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    # [tokens, PARTS, W] of KIND: W channels from `channel` + part * STEP of a head on, the sum of one row for each stage. A loop that stays
    # a loop keeps the layout of the loads; unrolled whole, every row would pass through shared memory on its way to the product's layout.
    part, i = tl.arange(0, PARTS), tl.arange(0, W)
    begin = channel + part * STEP
    row, column = (0 if SHARED else begin // PIECE * R) + part * 0, begin % PIECE
    inside = tables + (row * (K * PIECE) + column)[None, :, None] + i[None, None, :]
    SPARED: tl.constexpr = 1 if DEPTH > 2 else 0  # one addition less, where what is left stays a loop
    total = tl.load(inside + ((word & 255) * PIECE)[:, :, None]).to(KIND) if SPARED else tl.zeros([word.shape[0], PARTS, W], KIND)
    for stage in tl.range(SPARED, DEPTH, num_stages=1):
        code = (word >> (8 * stage)) & 255
        total += tl.load(inside + ((stage * K + code) * PIECE)[:, :, None]).to(total.dtype)
    return total


@triton.jit
def _scores(
    query, codes, tables, sizes, turns, offsets, base, out, tokens, share, lanes, splits, batches, scale,
    stride_batch, stride_strip, stride_code, stride_token, size_batch, size_head, size_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    PIECE: tl.constexpr, R: tl.constexpr, K: tl.constexpr, STRIPS: tl.constexpr, SHARED: tl.constexpr,
    PARTS: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr, HIGH: tl.constexpr,
    SLICES: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr,
    PACKED: tl.constexpr, BT: tl.constexpr, BG: tl.constexpr, MULTIPROCESSORS: tl.constexpr, TWICE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    work, table, batch, stretch = task(lanes, splits, batches, MULTIPROCESSORS, TWICE)
    if not work:
        return
    head, part, group = table // (SLICES * GROUPS), table // GROUPS % SLICES, table % GROUPS
    HALF: tl.constexpr = D // 2
    OWN: tl.constexpr = PARTS // SLICES  # parts of each half in a slice
    WIDE: tl.constexpr = OWN * W  # channels of each half
    t, g, f = tl.arange(0, BT), tl.arange(0, BG), tl.arange(0, WIDE)
    codes, tables = seat(codes, tables, batch, head, stride_batch, stride_strip, stride_code, D, PIECE, R, K, STRIPS, SHARED)
    earlier = part * (OWN * STEP // PIECE)  # pieces of earlier slices; 0 where a piece is half a head or more, which is never sliced
    codes += (earlier * R + group * DEPTH) * stride_code
    tables += ((0 if SHARED else earlier * R) + group * DEPTH) * (K * PIECE)
    row = (batch * HEADS + head) * GROUP
    f += part * WIDE
    own = query + (row + g[:, None]) * D + f[None, :]
    low = tl.load(own, mask=g[:, None] < GROUP, other=0.0).to(tl.float32) * scale
    high = tl.load(own + HALF, mask=g[:, None] < GROUP, other=0.0).to(tl.float32) * scale
    begin = stretch * share
    end = tl.minimum(tokens, begin + share)
    # The query is turned back to the first token of each tile, by the same angle from tile to tile: a product instead of sines.
    start = tl.load(base + batch) + begin
    once, leap = tl.load(turns + f), tl.load(turns + HALF + f)
    c, s = turn((start // BT).to(tl.float32) * leap + (start % BT).to(tl.float32) * once)
    low, high = low * c[None, :] + high * s[None, :], high * c[None, :] - low * s[None, :]
    c, s = turn(leap)
    p, i = tl.arange(0, OWN), tl.arange(0, W)
    around = offsets + part * WIDE + t[:, None, None] * HALF + (p * W)[None, :, None] + i[None, None, :]
    cos, sin = tl.load(around), tl.load(around + BT * HALF)
    out += ((part * GROUPS + group).to(tl.int64) * (batches * HEADS * GROUP) + row) * tokens
    own_low = _words(codes, begin + t, end, stride_code, stride_token, 0, OWN, STEP, PIECE, R, DEPTH, PACKED)
    own_high = _words(codes, begin + t, end, stride_code, stride_token, HIGH, OWN, STEP, PIECE, R, DEPTH, PACKED)
    # Pipelining would stage the gathered rows in shared memory and bypass the first-level cache, where the tables live.
    for at in tl.range(begin, end, BT, num_stages=1):
        token = at + t
        seen = token < end
        next_low = _words(codes, token + BT, end, stride_code, stride_token, 0, OWN, STEP, PIECE, R, DEPTH, PACKED)
        next_high = _words(codes, token + BT, end, stride_code, stride_token, HIGH, OWN, STEP, PIECE, R, DEPTH, PACKED)
        k_low = _rebuild(own_low, tables, 0, OWN, W, STEP, PIECE, R, DEPTH, K, SHARED, KIND)
        k_high = _rebuild(own_high, tables, HIGH, OWN, W, STEP, PIECE, R, DEPTH, K, SHARED, KIND)
        own_low, own_high = next_low, next_high
        k_low, k_high = k_low * cos - k_high * sin, k_high * cos + k_low * sin
        score = tl.dot(low.to(KIND), tl.trans(tl.reshape(k_low, [BT, WIDE])), input_precision="ieee")
        score = tl.dot(high.to(KIND), tl.trans(tl.reshape(k_high, [BT, WIDE])), score, input_precision="ieee")
        low, high = low * c[None, :] + high * s[None, :], high * c[None, :] - low * s[None, :]
        if sizes is not None:
            size = tl.load(sizes + batch.to(tl.int64) * size_batch + head * size_head + token * size_token, mask=seen, other=0.0)
            score *= size.to(tl.float32)[None, :]
        tl.store(out + g[:, None].to(tl.int64) * tokens + token[None, :], score, mask=(g[:, None] < GROUP) & seen[None, :])


@triton.jit
def _join(scores, first, peaks, tokens, rows, queries, PARTIAL: tl.constexpr, RAGGED: tl.constexpr, BT: tl.constexpr):
    # Partial scores added up into the first, -inf where a token is not visible; the largest of a row goes to `peaks`
    row, token = tl.program_id(0), tl.program_id(1) * BT + tl.arange(0, BT)
    own = scores + row.to(tl.int64) * tokens + token
    score = tl.load(own, mask=token < tokens, other=float("-inf"))
    for share in tl.static_range(1, PARTIAL):  # `rows` of one is a constant, not a tensor
        score += tl.load(scores + (row.to(tl.int64) + share * rows) * tokens + token, mask=token < tokens, other=0.0)
    if RAGGED:
        score = tl.where(token >= tl.load(first + row // queries), score, float("-inf"))
    tl.store(own, score, mask=token < tokens)
    tl.atomic_max(peaks + row, tl.max(score, 0))


@triton.jit
def _values(
    scores, peaks, codes, tables, sizes, out, lse, tokens, share, lanes, splits, batches, stride_batch, stride_strip, stride_code, stride_token,
    size_batch, size_head, size_token, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    PIECE: tl.constexpr, R: tl.constexpr, K: tl.constexpr, STRIPS: tl.constexpr, SHARED: tl.constexpr,
    PARTS: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr, HIGH: tl.constexpr,
    SLICES: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr,
    PACKED: tl.constexpr, BT: tl.constexpr, BG: tl.constexpr, MULTIPROCESSORS: tl.constexpr, TWICE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    work, table, batch, stretch = task(lanes, splits, batches, MULTIPROCESSORS, TWICE)
    if not work:
        return
    head, part, group = table // (SLICES * GROUPS), table // GROUPS % SLICES, table % GROUPS
    OWN: tl.constexpr = PARTS // SLICES
    WIDE: tl.constexpr = OWN * W
    t, g, d = tl.arange(0, BT), tl.arange(0, BG), tl.arange(0, WIDE)
    codes, tables = seat(codes, tables, batch, head, stride_batch, stride_strip, stride_code, D, PIECE, R, K, STRIPS, SHARED)
    earlier = part * (OWN * STEP // PIECE)
    codes += (earlier * R + group * DEPTH) * stride_code
    tables += ((0 if SHARED else earlier * R) + group * DEPTH) * (K * PIECE)
    rows, row = batches * HEADS * GROUP, (batch * HEADS + head) * GROUP
    own = scores + (row + g[:, None]).to(tl.int64) * tokens
    peak = tl.load(peaks + row + g, mask=g < GROUP, other=0.0)
    peak = tl.where(peak > float("-inf"), peak, 0.0)
    heavy = tl.zeros([BG, BT], tl.float32)
    total = tl.zeros([BG, WIDE], tl.float32)
    begin = stretch * share
    end = tl.minimum(tokens, begin + share)
    real = g[:, None] < GROUP
    word = _words(codes, begin + t, end, stride_code, stride_token, 0, OWN, STEP, PIECE, R, DEPTH, PACKED)
    score = tl.load(own + (begin + t)[None, :], mask=real & (begin + t < end)[None, :], other=float("-inf"))
    for at in tl.range(begin, end, BT, num_stages=1):
        token = at + t
        ahead = token + BT
        next_word = _words(codes, ahead, end, stride_code, stride_token, 0, OWN, STEP, PIECE, R, DEPTH, PACKED)
        next_score = tl.load(own + ahead[None, :], mask=real & (ahead < end)[None, :], other=float("-inf"))
        weight = tl.exp2((score - peak[:, None]) * 1.4426950408889634)
        heavy += weight
        if sizes is not None:
            size = tl.load(sizes + batch.to(tl.int64) * size_batch + head * size_head + token * size_token, mask=token < end, other=0.0)
            weight *= size.to(tl.float32)[None, :]
        value = _rebuild(word, tables, 0, OWN, W, STEP, PIECE, R, DEPTH, K, SHARED, KIND)
        total = tl.dot(weight.to(KIND), tl.reshape(value, [BT, WIDE]), total, input_precision="ieee")
        word, score = next_word, next_score
    mass = tl.sum(heavy, 1)
    place = stretch.to(tl.int64) * rows + row + g
    mine = out + (group * (splits * TWICE) * rows.to(tl.int64) + place)[:, None] * D + part * WIDE + d[None, :]
    tl.store(mine, total / tl.where(mass > 0, mass, 1.0)[:, None], mask=g[:, None] < GROUP)
    if part + group == 0:
        tl.store(lse + place, tl.where(mass > 0, peak + tl.log(mass), float("-inf")), mask=g < GROUP)


def attend(
    query: Tensor, keys, values, tokens: int, scale: float, inv_freq: Tensor | None = None, base: Tensor | None = None, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`kernels.lookup.attend`; D a power of two from 32 on, pieces that divide D/2 or are multiples of it, values not strided."""
    batch, queries, dim = query.shape
    heads = keys.tables.shape[0] * keys.tables.shape[3] // dim
    group = queries // heads
    rows = batch * queries
    key, value = layout(keys, dim, True), layout(values, dim, False)
    mine, theirs = divide(key, dim, keys.tables.element_size()), divide(value, dim, values.tables.element_size())
    common = {"HEADS": heads, "GROUP": group, "D": dim, "BT": TILE, "BG": max(16, triton.next_power_of_2(group)),
              "MULTIPROCESSORS": lookup_shares_triton.MULTIPROCESSORS, "TWICE": TWICE, "KIND": kind(query), **LIMIT}  # fmt: skip
    if inv_freq is None:
        scores = lookup_sums_triton.scores(query, keys, tokens, scale, tokens, None)[None]
    else:
        piece = keys.tables.shape[3] if keys.strided else None
        query = query[..., halves(dim, piece, query.device)] if piece else query.contiguous()
        scores = torch.empty(mine.slices * mine.groups, rows, tokens, device=query.device)
        lanes, splits, share, grid = spread(heads * mine.slices * mine.groups, batch, tokens, TILE)
        _scores[grid,](
            query, keys.codes, keys.tables, keys.sizes, *rotation(inv_freq, piece, TILE, query.dtype == torch.float32), base, scores, tokens, share, lanes, splits, batch, scale,
            *keys.codes.stride(), *strides(keys.sizes, 3), **key._asdict(), SLICES=mine.slices, DEPTH=mine.depth, GROUPS=mine.groups,
            PACKED=packed(keys.codes), **common,
        )  # fmt: skip
    peaks = torch.full((rows,), float("-inf"), device=query.device)
    _join[rows, triton.cdiv(tokens, JOINED)](scores, first, peaks, tokens, rows, queries, PARTIAL=len(scores), RAGGED=first is not None, BT=JOINED)
    lanes, splits, share, grid = spread(heads * theirs.slices * theirs.groups, batch, tokens, TILE)
    parts = torch.empty(theirs.groups, splits * TWICE, rows, dim, device=query.device)
    sums = torch.empty(splits * TWICE, rows, device=query.device)
    _values[grid,](
        scores, peaks, values.codes, values.tables, values.sizes, parts, sums, tokens, share, lanes, splits, batch,
        *values.codes.stride(), *strides(values.sizes, 3), **value._asdict(), SLICES=theirs.slices,
        DEPTH=theirs.depth, GROUPS=theirs.groups, PACKED=packed(values.codes), **common,
    )  # fmt: skip
    return merge(parts, sums, torch.empty(batch, queries, dim, device=query.device))
