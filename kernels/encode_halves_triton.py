"""Triton: as :mod:`kernels.encode_whole_triton`, with eight warps, each of half a page."""

import triton
import triton.language as tl

from kernels.encode_whole_triton import level_of

_ROUND = tl.constexpr("{ .reg .b32 a, b; shfl.sync.bfly.b32 a, $1, 1, 31, -1; prmt.b32 b, $1, a, $2; shfl.sync.bfly.b32 a, b, 2, 31, -1; prmt.b32 $0, b, a, $3; }")


@triton.jit
def _halves(fields, WIDTH: tl.constexpr, DIM: tl.constexpr, ASM: tl.constexpr):
    """Words [8 halves of pages, 8, D / 16, 4] of position 8 n + a and, odd lanes, D / 2 behind it, from fields [8, 8 tokens, D / 2] of 16 bits.

    Lanes 0 and 1 are words of the first plane of two bits, lanes 2 and 3 of the second, or, where WIDTH is odd, half the bits of the last.
    """
    e, lane = tl.arange(0, 2), tl.arange(0, 4)
    if ASM:
        pairs = tl.sum(tl.reshape(fields, [8, 8, DIM // 16, 4, 2]) << (16 * e), 4)
        pairs = tl.inline_asm_elementwise("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [pairs], dtype=tl.int32, is_pure=True, pack=1)
    else:
        pairs = tl.sum(tl.reshape(fields, [8, 4, 2, DIM // 16, 8]) << (16 * e)[:, None, None], 2)
        pairs = tl.permute(pairs, (0, 3, 2, 1))
    part = pairs & 0x0F0F0F0F
    part = (part | (part >> 12)) & 0xFFFF
    if WIDTH != 2:
        high = (pairs >> 4) & 0x0F0F0F0F
        if WIDTH % 2 == 1:
            high = (high | (high >> 1)) & 0x03030303
        part |= (high | (high >> 12)) << 16
    if ASM:
        first, second = tl.where(lane % 2 == 0, 0x6240, 0x3715), tl.where(lane < 2, 0x5410, 0x3276)
        none = tl.zeros_like(part)
        return tl.inline_asm_elementwise(_ROUND, "=r,r,r,r", [part, none + first, none + second], dtype=tl.int32, is_pure=True, pack=1)
    byte = (part[:, :, :, :, None] >> (8 * lane)) & 0xFF
    return tl.sum(byte << (8 * lane)[:, None], 3)


@triton.jit
def _store(target, found, keep, mask):
    """Words whose bits of other tokens, of a page begun, stay."""
    old = tl.load(target, mask=mask & (keep != 0), other=0) & keep
    tl.store(target, found | old, mask=mask)


@triton.jit
def encode_halves(
    keys, values, key_words, key_sides, value_words, value_sides, rotation, shift, rows, books, starts, counts, pages,
    kb, kh, kt, vb, vh, vt, kwb, kwh, ksb, key_rows, vwb, vwh, vsb, value_rows, pages_stride, part,
    HEADS: tl.constexpr, DIM: tl.constexpr, KEY_PAGE: tl.constexpr, VALUE_PAGE: tl.constexpr, WIDTH: tl.constexpr,
    KEY_LOG8: tl.constexpr, VALUE_LOG8: tl.constexpr, KEY_SQUARES: tl.constexpr, VALUE_SQUARES: tl.constexpr,
    CENTRED: tl.constexpr, TABLE: tl.constexpr, ASM: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """keys, values [B, H, T, D] (strides kb.. vt, D contiguous): tokens starts[b] .. starts[b] + counts[b] - 1 of the cache."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    is_value = head >= HEADS
    start, count = tl.load(starts + batch), tl.load(counts + batch)
    at_head = tl.where(is_value, head - HEADS, head)
    source = tl.where(is_value, values + batch * vb + at_head * vh, keys + batch * kb + at_head * kh)
    stride = tl.where(is_value, vt, kt)
    words = tl.where(is_value, value_words + batch * vwb + at_head * vwh, key_words + batch * kwb + at_head * kwh)
    sides = tl.where(is_value, value_sides + batch * vsb, key_sides + batch * ksb) + tl.load(rows + head) * 32
    page_words, page_sides = tl.where(is_value, VALUE_PAGE, KEY_PAGE), tl.where(is_value, value_rows, key_rows) * 32
    squares, log8 = tl.where(is_value, VALUE_SQUARES, KEY_SQUARES), tl.where(is_value, VALUE_LOG8, KEY_LOG8)
    book = books + head * 16
    row, d, p = tl.arange(0, 128), tl.arange(0, DIM), tl.arange(0, DIM)
    slot = 16 * (row // 64) + row // 8 % 2 * 8 + row % 8
    of_row = 32 * (row // 16 % 4) + slot  # a warp's rows are those of a page
    at = row // 8 % 2 * 2  # of a field
    turn = rotation + head * DIM * DIM + p[None, :] * DIM + d[:, None]
    high = tl.load(turn)
    low = tl.load(turn + part)
    MASK: tl.constexpr = 16 if WIDTH == 1 else (3 if WIDTH == 2 else (19 if WIDTH == 3 else 51))
    first = start // 32
    last = (start + count + 31) // 32
    tiles = tl.where(count > 0, (last - first + 3) // 4, 0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        base = first + 4 * tile
        token = base * 32 + of_row - start
        fresh = (token >= 0) & (token < count)
        x = tl.load(source + token.to(tl.int64)[:, None] * stride + d[None, :], mask=fresh[:, None], other=0)
        if ASM:
            if AHEAD:  # the next step's tokens on their way to L2
                soon = tl.minimum(tl.maximum(token + 128 * tl.num_programs(0), 0), count - 1).to(tl.int64)
                lines = source + soon[:, None] * stride + 64 * tl.arange(0, DIM // 64 if DIM > 64 else 1)[None, :]
                tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1)
            y = tl.dot(x, high, acc=tl.dot(x, low))
        else:
            y = tl.dot(x.to(tl.float32), high.to(tl.float32) + low.to(tl.float32), input_precision="ieee")
        if CENTRED:
            y -= tl.load(shift + head * DIM + p)[None, :]
        norm = tl.sqrt(tl.sum(y * y, 1))
        down = tl.where(norm > 0, -(DIM**0.5) / tl.where(norm > 0, norm, 1.0), 0.0)
        v = y * down[:, None] + 0.0  # never -0.0: its sign says whether y is positive
        level = level_of(v, book, WIDTH, False, ASM)
        power = tl.sum(level * level, 1)
        sign = v.to(tl.int32, bitcast=True) >> 31
        bits = level.to(tl.int32, bitcast=True)
        if KEY_SQUARES or VALUE_SQUARES:
            inner = tl.sum(tl.abs(y) * level, 1)
            gain = tl.where(squares, inner / power, norm / tl.sqrt(power))
        else:
            gain = norm / tl.sqrt(power)
        if KEY_LOG8 or VALUE_LOG8:
            byte = tl.floor(8 * tl.log2(tl.maximum(gain, 2.0**-30)) + 0.5) + 128
            gain = tl.where(log8, tl.minimum(tl.maximum(byte, 0.0), 255.0), gain)
        of_page = base + row // 16 % 4
        inside = of_page < last
        if TABLE:
            of_page = tl.load(pages + batch * pages_stride + of_page, mask=inside, other=0)
        tl.store(sides + of_page.to(tl.int64) * page_sides + slot, gain.to(sides.dtype.element_ty), mask=fresh)
        fields = ((bits ^ sign) & MASK) * tl.where(fresh, 1 << at, 0)[:, None]
        fields = tl.sum(tl.reshape(fields, [8, 2, 8, 2, DIM // 2]), 1)
        found = _halves(tl.sum(fields << (8 * tl.arange(0, 2))[:, None], 2), WIDTH, DIM, ASM)
        unit, lane = tl.arange(0, 8), tl.arange(0, 4)
        page = base + unit % 4
        inside = page < last
        if TABLE:
            page = tl.load(pages + batch * pages_stride + page, mask=inside, other=0)
        a, n = tl.arange(0, 8), tl.arange(0, DIM // 16)
        position = a[:, None, None] + 8 * n[None, :, None] + (lane % 2 * (DIM // 2))[None, None, :]  # [8, D / 16, 4]
        begun = tl.where(tile == 0, start % 32, 0)
        target = (words + page.to(tl.int64) * page_words + unit // 4 * DIM)[:, None, None, None] + (position + (lane // 2 * 2 * DIM)[None, None, :])[None]
        mask = inside[:, None, None, None] & ((lane < WIDTH // 2 * 2)[None, None, :] & (position >= 0))[None]
        if WIDTH > 1:
            if begun > 0:
                token16, held = tl.arange(0, 16)[None, :], tl.where(unit % 4 == 0, begun - 16 * (unit // 4), 0)[:, None]
                pair = tl.sum(tl.where(token16 < held, 3 << (4 * (token16 % 8) + token16 // 8 * 2), 0), 1)
                _store(target, found, pair[:, None, None, None] + tl.zeros_like(found), mask)
            else:
                tl.store(target, found, mask=mask)
        if WIDTH % 2 == 1:
            found = tl.sum(tl.reshape(found << (2 * (unit // 4))[:, None, None, None], [2, 4, 8, DIM // 16, 4]), 0)
            page = base + tl.arange(0, 4)
            inside = page < last
            if TABLE:
                page = tl.load(pages + batch * pages_stride + page, mask=inside, other=0)
            target = (words + page.to(tl.int64) * page_words + (WIDTH - 1) * DIM)[:, None, None, None] + position[None]
            mask = inside[:, None, None, None] & ((lane > 1)[None, None, :] & (position >= 0))[None]
            if begun > 0:
                slots = tl.arange(0, 32)
                keep = tl.sum(tl.where(slots < begun, 1 << (4 * (slots % 8) + slots // 8), 0), 0)
                keep = tl.where(tl.arange(0, 4) == 0, keep, 0)
                _store(target, found, keep[:, None, None, None] + tl.zeros_like(found), mask)
            else:
                tl.store(target, found, mask=mask)
