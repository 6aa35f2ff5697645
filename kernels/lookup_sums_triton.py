"""Scores of keys coded after RoPE: a query's products with all table rows are computed once, a token's score is a sum of them.

A token and head gathers 2 bytes per code and query head where its rows would be 2 or 4 KB (4 bytes for float32 queries); the products of a
head (32 KB at 16 codes of 256 entries and 4 query heads) stay in the first-level cache. Not for keys before RoPE, whose products change from token to token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.lookup_rows_triton import kind, packed, strides

ROWS = 128  # table rows multiplied at once
TILE = 256  # tokens summed at once
PROGRAMS = 528  # four for each of 132 multiprocessors


@triton.jit
def _products(
    query, tables, out, scale, GROUP: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr, ROWS_OF: tl.constexpr, SHARED: tl.constexpr, STRIDED: tl.constexpr,
    HEADS: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    # out [B, H, pieces of a head, R * K, GROUP]: rows of a head's pieces times its queries
    PIECES: tl.constexpr = D // W
    own, part = tl.program_id(0) // PIECES, tl.program_id(0) % PIECES
    head = own % HEADS
    r, w, g = tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, BW), tl.arange(0, BG)
    if PIECE > D:
        piece, within = head // (PIECE // D), head % (PIECE // D) * D
    else:
        piece, within = head * PIECES + part, head * 0
    if not SHARED:
        tables += piece.to(tl.int64) * ROWS_OF * PIECE
    rows = tl.load(tables + within + r[:, None] * PIECE + w[None, :], mask=(r[:, None] < ROWS_OF) & (w[None, :] < W), other=0.0).to(KIND)
    channel = w * PIECES + part if STRIDED else part * W + w
    q = tl.load(query + (own.to(tl.int64) * GROUP + g[None, :]) * D + channel[:, None], mask=(g[None, :] < GROUP) & (w[:, None] < W), other=0.0)
    score = tl.dot(rows, (q.to(tl.float32) * scale).to(KIND), input_precision="ieee")
    at = (tl.program_id(0).to(tl.int64) * ROWS_OF + r[:, None]) * GROUP + g[None, :]
    tl.store(out + at, score.to(out.dtype.element_ty), mask=(r[:, None] < ROWS_OF) & (g[None, :] < GROUP))


@triton.jit
def _looked_up(score, products, word, first, COUNT: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, g):
    # `score` [tokens, queries] and the products of COUNT codes from number `first` on, the bytes of a word
    for i in tl.static_range(COUNT):
        code = (first + i) * K + ((word >> (8 * i)) & 255)
        score += tl.load(products + code[:, None] * GROUP + g[None, :], mask=g[None, :] < GROUP, other=0.0).to(tl.float32)
    return score


@triton.jit
def _sums(
    products, codes, sizes, first, out, tokens, room, share, stride_batch, stride_strip, stride_code, stride_token, size_batch, size_head, size_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    STRIPS: tl.constexpr, COUNT: tl.constexpr, WORD: tl.constexpr, BG: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    batch, head = own // HEADS, own % HEADS
    t, g = tl.arange(0, BT), tl.arange(0, BG)
    codes += batch.to(tl.int64) * stride_batch
    if STRIPS:
        codes += head.to(tl.int64) * stride_strip
    else:
        codes += head * D // PIECE * R * stride_code
    products += own.to(tl.int64) * COUNT * K * GROUP
    out += own.to(tl.int64) * GROUP * room
    begin = tl.program_id(1) * share
    end = tl.minimum(room, begin + share)
    for at in tl.range(begin, end, BT, num_stages=1):
        token = at + t
        seen = (token < end) & (token < tokens)
        score = tl.zeros([BT, BG], tl.float32)
        for begun in tl.static_range(0, COUNT, WORD):
            place = codes + begun * stride_code + token * stride_token
            if WORD == 16:  # sixteen codes at once: a line of the cache is asked for once, not four times
                four = tl.load(place.to(tl.pointer_type(tl.int32), bitcast=True)[:, None] + tl.arange(0, 4)[None, :], mask=seen[:, None], other=0)
                even, odd = tl.split(tl.reshape(four, [BT, 2, 2]))
                a, c = tl.split(even)
                b, d = tl.split(odd)
                score = _looked_up(score, products, a, begun, 4, GROUP, K, g)
                score = _looked_up(score, products, b, begun + 4, 4, GROUP, K, g)
                score = _looked_up(score, products, c, begun + 8, 4, GROUP, K, g)
                score = _looked_up(score, products, d, begun + 12, 4, GROUP, K, g)
            else:
                place = place.to(tl.pointer_type(tl.int32), bitcast=True) if WORD == 4 else place
                score = _looked_up(score, products, tl.load(place, mask=seen, other=0).to(tl.int32), begun, WORD, GROUP, K, g)
        if sizes is not None:
            size = tl.load(sizes + batch.to(tl.int64) * size_batch + head * size_head + token * size_token, mask=seen, other=0.0)
            score *= size.to(tl.float32)[:, None]
        if first is not None:
            seen &= token >= tl.load(first + batch)
        score = tl.where(seen[:, None], score, float("-inf"))
        tl.store(out + g[None, :].to(tl.int64) * room + token[:, None], score, mask=(token < end)[:, None] & (g[None, :] < GROUP))


def _word(codes: Tensor, count: int) -> int:
    # How many of a token's `count` codes are asked for at once
    aligned = lambda n: packed(codes) and not any(x % n for x in (*codes.stride()[:2], codes.stride(3), codes.data_ptr(), count))  # noqa: E731
    return next((n for n in (16, 4) if aligned(n)), 1)


def scores(query: Tensor, keys, tokens: int, scale: float, room: int, first: Tensor | None) -> Tensor:
    """Scores [B * Hq, room] float32 of query [B, Hq, D] (channels in order) with keys coded after RoPE.

    -inf from `tokens` to `room`, and before `first` [B] if that is given.
    """
    batch, queries, dim = query.shape
    pieces, stages, entries, piece = keys.tables.shape
    heads = pieces * piece // dim
    group, width = queries // heads, min(piece, dim)
    count = dim // width * stages
    # Half the bytes are fewer lines of the first-level cache per lookup; a sum of float16 products is off by less than float16 sums of rows.
    products = torch.empty(batch * heads, count * entries, group, device=query.device, dtype=torch.float32 if query.dtype == torch.float32 else torch.float16)
    shared = pieces > 1 and keys.tables.stride(0) == 0
    shape = {"GROUP": group, "D": dim, "PIECE": piece, "HEADS": heads}
    _products[batch * heads * (dim // width), triton.cdiv(stages * entries, ROWS)](
        query.contiguous(), keys.tables, products, scale, **shape, ROWS_OF=stages * entries, SHARED=shared, STRIDED=keys.strided, W=width,
        BW=max(16, width), BG=max(16, triton.next_power_of_2(group)), BR=ROWS, KIND=kind(query),
    )  # fmt: skip
    out = torch.empty(batch * queries, room, device=query.device)
    splits = max(1, min(triton.cdiv(tokens, TILE), PROGRAMS // (batch * heads)))
    share = TILE * triton.cdiv(tokens, TILE * splits)
    _sums[batch * heads, triton.cdiv(room, share)](
        products, keys.codes, keys.sizes, first, out, tokens, room, share, *keys.codes.stride(), *strides(keys.sizes, 3),
        **shape, R=stages, K=entries, STRIPS=keys.codes.shape[1] > 1, COUNT=count, WORD=_word(keys.codes, count),
        BG=triton.next_power_of_2(group), BT=TILE, num_warps=8,
    )  # fmt: skip
    return out
