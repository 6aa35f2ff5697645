"""Attention over residual codes whose rows go from the first-level cache straight into the operands of the products, past shared memory.

Obeys `kernels.lookup`, divides the work as `kernels.lookup_shares_triton` says, and differs from `kernels.lookup_bound_triton` in what a lane holds.
The first-level cache serves one line per clock whether it answers a gather or shared memory, and there the way of a rebuilt tile through shared
memory took nearly as many clocks as its rows (profiled: NOTES.md). Here a lane gathers the entries that the tensor core expects of it:
in an operand of m16n8k16 four lanes share a row and eight share a column, so four lanes hold one token's chunks of channels for the scores and four
tokens' same chunk for the values. Sums over channels and tokens do not mind their order, so a chunk stays contiguous and one load fetches it. A warp
has 16 tokens of its own in every tile (a batch of products, one per warp) and never waits for another. A program of `_scores` goes through the
shares of the tables itself, adding to the scores that it wrote, so there is one [queries, tokens] of them; a program of `_values` takes the maximum
of its stretch from them first, so that its loop over rows has no running maximum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import lookup_bound_triton, lookup_shares_triton, lookup_sums_triton
from kernels.lookup_codes_triton import gathered, picked, words
from kernels.lookup_rows_triton import halves, kind, layout, merge, packed, rotation, seat, strides, turn
from kernels.lookup_shares_triton import LIMIT, TWICE, divide, spread, task

WARPS = LIMIT["num_warps"]  # each with 16 tokens of a tile
FEWEST = 4  # fewest channels in a row that a lane gathers: `_values` stores by fours
TURNED = 8  # tiles whose queries a program of `_turned` turns


@triton.jit
def _turned(query, turns, base, out, tiles, scale, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BG: tl.constexpr, COUNT: tl.constexpr):
    # out [B * H, tiles, GROUP, D] float16: queries turned back to the first position of each tile of BT tokens, times `scale`
    unit, tile = tl.program_id(0), tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    HALF: tl.constexpr = D // 2
    g, f = tl.arange(0, BG), tl.arange(0, HALF)
    seen = g[:, None] < GROUP
    own = query + (unit * GROUP + g[:, None]) * D + f[None, :]
    low = tl.load(own, mask=seen, other=0.0).to(tl.float32) * scale
    high = tl.load(own + HALF, mask=seen, other=0.0).to(tl.float32) * scale
    start = tl.load(base + unit // HEADS) + tile * BT
    once, leap = tl.load(turns + f), tl.load(turns + HALF + f)
    c, s = turn((start // BT).to(tl.float32)[:, None] * leap[None, :] + (start % BT).to(tl.float32)[:, None] * once[None, :])
    c, s = c[:, None, :], s[:, None, :]
    place = out + ((unit.to(tl.int64) * tiles + tile[:, None, None]) * GROUP + g[None, :, None]) * D + f[None, None, :]
    written = (tile[:, None, None] < tiles) & seen[None, :, :]
    tl.store(place, (low[None, :, :] * c + high[None, :, :] * s).to(out.dtype.element_ty), mask=written)
    tl.store(place + HALF, (high[None, :, :] * c - low[None, :, :] * s).to(out.dtype.element_ty), mask=written)


@triton.jit
def _query(turned, V: tl.constexpr, EIGHT: tl.constexpr, REP: tl.constexpr, WARPS: tl.constexpr, BG: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr):
    # Half of the channels of a tile's queries as an operand [warps, channels, queries], channels in the order in which `_scores` gathers them.
    # Every warp loads its own copy (a mask over the warps makes Triton do so): one copy for all would go through shared memory.
    g = tl.arange(0, 8)[None, :, None, None, None, None, None] + tl.arange(0, BG // 8)[None, None, None, :, None, None, None] * 8
    chunk = tl.arange(0, 4)[:, None, None, None, None, None, None] + tl.arange(0, REP)[None, None, None, None, :, None, None] * 4
    within = tl.arange(0, V // EIGHT)[None, None, None, None, None, :, None] * EIGHT + tl.arange(0, EIGHT)[None, None, None, None, None, None, :]
    own = tl.zeros([WARPS], tl.int32)[None, None, :, None, None, None, None]
    x = tl.load(turned + g * D + chunk * V + within + own, mask=(g < GROUP) & (own == 0), other=0.0)
    x = tl.reshape(x, [4, 8, WARPS, BG // 8, REP, V // 2, 2])
    return tl.reshape(tl.permute(x, [2, 4, 5, 0, 6, 3, 1]), [WARPS, REP * V * 4, BG])


@triton.jit
def _scores(
    turned, codes, tables, sizes, offsets, first, out, tokens, room, tiles, share, lanes, splits, batches,
    stride_batch, stride_strip, stride_code, stride_token, size_batch, size_head, size_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr, R: tl.constexpr, K: tl.constexpr, STRIPS: tl.constexpr, SHARED: tl.constexpr,
    PARTS: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr, HIGH: tl.constexpr, SLICES: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr,
    V: tl.constexpr, WORDS: tl.constexpr, WARPS: tl.constexpr, BG: tl.constexpr, MULTIPROCESSORS: tl.constexpr, TWICE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    work, head, batch, stretch = task(lanes, splits, batches, MULTIPROCESSORS, TWICE)
    if not work:
        return
    HALF: tl.constexpr = D // 2
    BT: tl.constexpr = 16 * WARPS
    OWN: tl.constexpr = PARTS // SLICES
    WIDE: tl.constexpr = OWN * W  # channels of each half
    REP: tl.constexpr = WIDE // (4 * V)
    EIGHT: tl.constexpr = min(V, 8)
    ONE: tl.constexpr = WORDS == 16 or HIGH < PIECE  # whether what is read for the lower half holds the upper half's codes
    above: tl.constexpr = (0 if SHARED else HIGH // PIECE * (R * K * PIECE)) + HIGH % PIECE  # from a row to the row of the other half
    codes, tables = seat(codes, tables, batch, head, stride_batch, stride_strip, stride_code, D, PIECE, R, K, STRIPS, SHARED)
    # Axes [4 lanes: chunks, 8 lanes: tokens, 2 tokens x warps, REP chunks, V channels]: the first operand of m16n8k16
    sw = tl.arange(0, 2 * WARPS)
    inner = tl.arange(0, 8)[None, :, None, None] + (sw % WARPS * 16 + sw // WARPS * 8)[None, None, :, None]
    chunk = tl.arange(0, 4)[:, None, None, None] + tl.arange(0, REP)[None, None, None, :] * 4
    piece = chunk // (W // V) * (STEP // PIECE)
    column = (chunk % (W // V) * V)[:, :, :, :, None] + tl.arange(0, V)[None, None, None, None, :]
    split = tl.arange(0, V // EIGHT)[None, None, None, None, :, None] * EIGHT + tl.arange(0, EIGHT)[None, None, None, None, None, :]
    around = offsets + (inner * HALF + chunk * V)[:, :, :, :, None, None] + split
    inside = tables + (piece * 0 if SHARED else piece * (R * K * PIECE))[:, :, :, :, None] + column
    lane = tl.minimum(tl.arange(0, 4), D // PIECE * R // 4 - 1)[:, None, None, None] if WORDS == 16 else 0
    unit = batch * HEADS + head
    turned += (unit.to(tl.int64) * tiles) * (GROUP * D)
    out += unit.to(tl.int64) * GROUP * room
    visible = 0 if first is None else tl.load(first + batch).to(tl.int32)
    begin = stretch * share
    end = tl.minimum(tokens, begin + share)
    t, g = tl.arange(0, WARPS)[:, None, None] * 16 + tl.arange(0, 16)[None, :, None], tl.arange(0, BG)[None, None, :]
    for turn_of in tl.range(0, SLICES * GROUPS, num_stages=1):  # one share of the tables after the other, each added to what is there
        part, group = turn_of // GROUPS, turn_of % GROUPS
        earlier = part * (OWN * STEP // PIECE)  # pieces of earlier slices; 0 where a piece is half a head or more, which is never sliced
        rows = inside + ((0 if SHARED else earlier * R) + group * DEPTH) * (K * PIECE)
        offset = (earlier + piece) * R + group * DEPTH
        # cosines and sines of the tile's own positions, the same for every tile
        cos = tl.reshape(tl.load(around + part * WIDE), [4, 8, 2 * WARPS, REP, V])
        sin = tl.reshape(tl.load(around + part * WIDE + BT * HALF), [4, 8, 2 * WARPS, REP, V])
        token = tl.minimum(begin + inner, tokens - 1)
        upper = offset + HIGH // PIECE * R
        mine = lane * 4 if WORDS == 16 else offset
        low = words(codes, mine, token, stride_code, stride_token, DEPTH, WORDS)
        high = low if ONE else words(codes, upper, token, stride_code, stride_token, DEPTH, WORDS)
        tl.debug_barrier()
        for at in tl.range(begin, end, BT, num_stages=1):
            token = tl.minimum(at + BT + inner, tokens - 1)
            next_low = words(codes, mine, token, stride_code, stride_token, DEPTH, WORDS)
            next_high = next_low if ONE else words(codes, upper, token, stride_code, stride_token, DEPTH, WORDS)
            if WORDS == 16:
                high, low = picked(low, upper, DEPTH), picked(low, offset, DEPTH)
            tile = turned + at // BT * (GROUP * D) + part * WIDE
            q_low, q_high = _query(tile, V, EIGHT, REP, WARPS, BG, GROUP, D), _query(tile + HALF, V, EIGHT, REP, WARPS, BG, GROUP, D)
            k_low, k_high = gathered(low, rows, V, DEPTH, K, PIECE, KIND), gathered(high, rows + above, V, DEPTH, K, PIECE, KIND)
            low, high = next_low, next_high
            k_low, k_high = k_low * cos - k_high * sin, k_high * cos + k_low * sin
            k_low = tl.permute(tl.reshape(k_low, [4, 8, 2, WARPS, REP, V // 2, 2]), [3, 2, 1, 4, 5, 0, 6])
            k_high = tl.permute(tl.reshape(k_high, [4, 8, 2, WARPS, REP, V // 2, 2]), [3, 2, 1, 4, 5, 0, 6])
            score = tl.dot(tl.reshape(k_low, [WARPS, 16, WIDE]), q_low, input_precision="ieee")
            score = tl.dot(tl.reshape(k_high, [WARPS, 16, WIDE]), q_high, score, input_precision="ieee")
            place = at + t
            if sizes is not None:
                size = tl.load(sizes + batch.to(tl.int64) * size_batch + head * size_head + tl.minimum(place, tokens - 1) * size_token)
                score *= size.to(tl.float32)
            own, real = out + g * room + place, (g < GROUP) & (place < room)
            if SLICES * GROUPS > 1:
                score += tl.load(own, mask=real & (turn_of > 0), other=0.0)
            seen = place < tokens if first is None else (place < tokens) & (place >= visible)
            tl.store(own, tl.where(seen, score, float("-inf")), mask=real)


@triton.jit
def _values(
    scores, codes, tables, sizes, out, lse, tokens, room, share, lanes, splits, batches, stride_batch, stride_strip, stride_code, stride_token,
    size_batch, size_head, size_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr, R: tl.constexpr, K: tl.constexpr, STRIPS: tl.constexpr, SHARED: tl.constexpr,
    PARTS: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr, HIGH: tl.constexpr, SLICES: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr,
    V: tl.constexpr, WORDS: tl.constexpr, WARPS: tl.constexpr, BG: tl.constexpr, MULTIPROCESSORS: tl.constexpr, TWICE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    work, table, batch, stretch = task(lanes, splits, batches, MULTIPROCESSORS, TWICE)
    if not work:
        return
    head, part, group = table // (SLICES * GROUPS), table // GROUPS % SLICES, table % GROUPS
    BT: tl.constexpr = 16 * WARPS
    OWN: tl.constexpr = PARTS // SLICES
    WIDE: tl.constexpr = OWN * W
    REP: tl.constexpr = WIDE // (8 * V)
    MORE: tl.constexpr = BG // 8
    codes, tables = seat(codes, tables, batch, head, stride_batch, stride_strip, stride_code, D, PIECE, R, K, STRIPS, SHARED)
    earlier = part * (OWN * STEP // PIECE)
    tables += ((0 if SHARED else earlier * R) + group * DEPTH) * (K * PIECE)
    # Axes [4 lanes: tokens, 8 lanes: chunks, 4 tokens x warps, REP chunks, V channels]: the first operand of the product transposed, channels x tokens
    sw = tl.arange(0, 4 * WARPS)
    inner = (tl.arange(0, 4) * 4)[:, None, None, None] + (sw % WARPS * 16 + sw // WARPS)[None, None, :, None]
    chunk = tl.arange(0, 8)[None, :, None, None] + tl.arange(0, REP)[None, None, None, :] * 8
    piece = chunk // (W // V) * (STEP // PIECE)
    column = (chunk % (W // V) * V)[:, :, :, :, None] + tl.arange(0, V)[None, None, None, None, :]
    inside = tables + (piece * 0 if SHARED else piece * (R * K * PIECE))[:, :, :, :, None] + column
    offset = (earlier + piece) * R + group * DEPTH
    rows, row = batches * HEADS * GROUP, (batch * HEADS + head) * GROUP
    g = tl.arange(0, 8)[:, None, None, None] + tl.arange(0, MORE)[None, None, :, None] * 8
    t = tl.arange(0, WARPS)[None, :, None, None] * 16 + tl.arange(0, 16)[None, None, None, :]
    own = scores + (row + g).to(tl.int64) * room + t
    real = (g < GROUP) & (t >= 0)  # over tokens, too: scores are loaded in this shape
    begin = stretch * share
    end = tl.minimum(room, begin + share)
    peak = tl.full([8, WARPS, MORE, 16], float("-inf"), tl.float32)
    for at in tl.range(begin, end, BT, num_stages=1):
        peak = tl.maximum(peak, tl.load(own + at, mask=real, other=float("-inf")))
    peak = tl.max(tl.max(peak, 3), 1)  # [8, MORE]
    peak = tl.where(peak > float("-inf"), peak, 0.0)
    heavy = tl.zeros([8, WARPS, MORE, 16], tl.float32)
    total = tl.zeros([WARPS, WIDE, BG], tl.float32)
    word = words(codes, offset, tl.minimum(begin + inner, tokens - 1), stride_code, stride_token, DEPTH, WORDS)
    for at in tl.range(begin, end, BT, num_stages=1):
        next_word = words(codes, offset, tl.minimum(at + BT + inner, tokens - 1), stride_code, stride_token, DEPTH, WORDS)
        score = tl.load(own + at, mask=real, other=float("-inf"))
        value = gathered(word, inside, V, DEPTH, K, PIECE, KIND)
        weight = tl.exp2((score - peak[:, None, :, None]) * 1.4426950408889634)
        heavy += weight
        if sizes is not None:
            size = tl.load(sizes + batch.to(tl.int64) * size_batch + head * size_head + tl.minimum(at + t, tokens - 1) * size_token)
            weight *= size.to(tl.float32)
        weight = tl.permute(tl.reshape(weight.to(KIND), [8, WARPS, MORE, 4, 2, 2]), [1, 4, 3, 5, 2, 0])
        value = tl.permute(tl.reshape(value, [4, 8, 2, 2, WARPS, REP, V]), [4, 5, 6, 1, 2, 0, 3])
        total = tl.dot(tl.reshape(value, [WARPS, WIDE, 16]), tl.reshape(weight, [WARPS, 16, BG]), total, input_precision="ieee")
        word = next_word
    mass = tl.sum(tl.sum(heavy, 3), 1)
    place = stretch.to(tl.int64) * rows + row
    if part + group == 0:
        each = tl.arange(0, 8)[:, None] + tl.arange(0, MORE)[None, :] * 8
        tl.store(lse + place + each, tl.where(mass > 0, peak + tl.log(mass), float("-inf")), mask=each < GROUP)
    mass = tl.reshape(tl.trans(mass), [BG])
    mass = tl.where(mass > 0, mass, 1.0)[None, None, None, :]
    # Warps are added up a quarter at a time: what shared memory takes, even once, the cache of rows lacks.
    total = tl.permute(tl.reshape(total, [WARPS, REP, V // 4, 2, 2, 8, BG]), [0, 1, 2, 5, 6, 3, 4])
    even, odd = tl.split(total)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    g = tl.arange(0, BG)[None, None, None, :]
    channel = (tl.arange(0, REP)[:, None, None, None] * 8 + tl.arange(0, 8)[None, None, :, None]) * V + tl.arange(0, V // 4)[None, :, None, None] * 4
    place = out + (group * (splits * TWICE) * rows.to(tl.int64) + place + g) * D + part * WIDE + channel
    tl.store(place, tl.sum(a, 0) / mass, mask=g < GROUP)
    tl.store(place + 1, tl.sum(b, 0) / mass, mask=g < GROUP)
    tl.store(place + 2, tl.sum(c, 0) / mass, mask=g < GROUP)
    tl.store(place + 3, tl.sum(d, 0) / mass, mask=g < GROUP)


def _chunk(rows, dim: int, lanes: int, width: int) -> int:
    # Channels that a lane loads at once, entries being `width` bytes: 16 bytes, unless `dim` are too few for all `lanes` or pieces are narrower
    return min(16 // width, dim // lanes, rows.W)


def _words(coded, rows, dim: int, depth: int) -> int:
    # As `words` takes them; 0 where a head's codes of a token do not lie side by side from an aligned address on
    codes, of_head = coded.codes, max(1, dim // rows.PIECE) * rows.R
    if not packed(codes) or any(codes.stride(i) % 4 for i in (0, 1, 3)) or not rows.STRIPS and of_head % 4 or depth == 1:
        return 0
    return 4 if depth == 4 else 8


def _picks(rows, share, dim: int, chunk: int) -> bool:
    # Whether the four lanes of a token need all its codes, no more words than lanes: then each asks for one word and they exchange them
    codes = dim // rows.PIECE * rows.R
    return share.slices * share.groups == 1 and dim == 8 * chunk and 4 < codes <= 16 and codes % 4 == 0


def attend(
    query: Tensor, keys, values, tokens: int, scale: float, inv_freq: Tensor | None = None, base: Tensor | None = None, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`kernels.lookup.attend`; D a power of two from 32 on, pieces that divide D/2 or are multiples of it, values not strided.

    Queries in float32, whose digits float16 operands lose, and pieces of fewer than four channels (strided: eight), less than what a lane stores
    at once, are left to :mod:`kernels.lookup_bound_triton`.
    """
    key, value = layout(keys, query.shape[2], True), layout(values, query.shape[2], False)
    if query.dtype == torch.float32 or min(key.W, value.W) < FEWEST:
        return lookup_bound_triton.attend(query, keys, values, tokens, scale, inv_freq, base, first)
    batch, queries, dim = query.shape
    heads = keys.tables.shape[0] * keys.tables.shape[3] // dim
    group, rows, tile = queries // heads, batch * queries, 16 * WARPS
    room = tile * triton.cdiv(tokens, tile)
    mine, theirs = divide(key, dim, keys.tables.element_size()), divide(value, dim, values.tables.element_size(), 32)
    common = {"HEADS": heads, "GROUP": group, "D": dim, "WARPS": WARPS, "BG": max(8, triton.next_power_of_2(group)),
              "MULTIPROCESSORS": lookup_shares_triton.MULTIPROCESSORS, "TWICE": TWICE, "KIND": kind(query), **LIMIT}  # fmt: skip
    if inv_freq is None:
        scores = lookup_sums_triton.scores(query, keys, tokens, scale, room, first)
    else:
        piece = keys.tables.shape[3] if keys.strided else None
        query = query[..., halves(dim, piece, query.device)] if piece else query.contiguous()
        turns, offsets = rotation(inv_freq, piece, tile, False)
        tiles = room // tile
        turned = torch.empty(batch * heads, tiles, group, dim, device=query.device, dtype=torch.float16)
        _turned[batch * heads, triton.cdiv(tiles, TURNED)](
            query, turns, base, turned, tiles, scale, HEADS=heads, GROUP=group, D=dim, BT=tile, BG=triton.next_power_of_2(group), COUNT=TURNED
        )
        scores = torch.empty(rows, room, device=query.device)
        lanes, splits, share, grid = spread(heads, batch, tokens, tile)
        chunk, read = _chunk(key, dim // 2 // mine.slices, 4, keys.tables.element_size()), _words(keys, key, dim, mine.depth)
        _scores[grid,](
            turned, keys.codes, keys.tables, keys.sizes, offsets, first, scores, tokens, room, tiles, share, lanes, splits, batch,
            *keys.codes.stride(), *strides(keys.sizes, 3), **key._asdict(), SLICES=mine.slices, DEPTH=mine.depth, GROUPS=mine.groups,
            V=chunk, WORDS=16 if read and _picks(key, mine, dim, chunk) else read, **common,
        )  # fmt: skip
    lanes, splits, share, grid = spread(heads * theirs.slices * theirs.groups, batch, tokens, tile)
    parts = torch.empty(theirs.groups, splits * TWICE, rows, dim, device=query.device)
    sums = torch.empty(splits * TWICE, rows, device=query.device)
    _values[grid,](
        scores, values.codes, values.tables, values.sizes, parts, sums, tokens, room, share, lanes, splits, batch,
        *values.codes.stride(), *strides(values.sizes, 3), **value._asdict(), SLICES=theirs.slices, DEPTH=theirs.depth, GROUPS=theirs.groups,
        V=_chunk(value, dim // theirs.slices, 8, values.tables.element_size()), WORDS=_words(values, value, dim, theirs.depth), **common,
    )  # fmt: skip
    return merge(parts, sums, torch.empty(batch, queries, dim, device=query.device))
