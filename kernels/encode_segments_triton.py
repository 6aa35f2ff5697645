"""Triton: prompts of heads of several segments, any widths from 1 to 8, levels symmetric about zero, keys and values in one launch.

As :mod:`kernels.encode_whole_triton`, but a program of four warps codes 128 tokens once, 32 stored positions of one segment after the other, of 5 to 8 bits 8;
the rotation's rows pass through shared memory. A segment of more positions is turned twice, first for its norm. What is left of a segment, up to 8 positions,
is coded by bisection with one load per step, which serves any width.

`rotation` [2, heads, D + 32, D]: matrices of the tokens' type that add up to it. `tiles` [.., 8] per head: width, first word, channels of the segment,
first number in `heap`, positions, first position. `groups` [.., 4]: first tile, last + 1, row of sides, channels. `heap`: as `books` there, but of 5 to 8 bits
the levels carry no code.
"""

import triton
import triton.language as tl

from kernels.encode_triton import _at
from kernels.encode_whole_triton import level_of, put, words_of


@triton.jit
def _turned(x, rows, shift, part, CENTRED: tl.constexpr, ASM: tl.constexpr):
    """Tokens x [128, D] times 8 or 32 rows of a rotation, float32 [128, rows]."""
    high, low = tl.trans(tl.load(rows)), tl.trans(tl.load(rows + part))
    y = tl.dot(x, high, acc=tl.dot(x, low)) if ASM else tl.dot(x, high.to(tl.float32) + low.to(tl.float32), input_precision="ieee")
    return y - tl.load(shift)[None, :] if CENTRED else y


@triton.jit
def _eight(y):
    """Sums of columns 8 apart, [128, 8] of [128, 32]: nothing leaves its lane."""
    return tl.sum(tl.reshape(y, [128, 4, 8]), 1)


@triton.jit
def _fields(code, weight):
    """What four tokens of a page add to its words, [4 pages, 8, columns] from [128, columns]."""
    return tl.sum(tl.sum(tl.reshape(code * weight, [2, 4, 2, 8, code.shape[1]]), 2), 0)


@triton.jit
def encode_segments(
    keys, values, key_words, key_sides, value_words, value_sides, rotation, shift, tiles, groups, heap, starts, counts, pages,
    kb, kh, kt, vb, vh, vt, kwb, kwh, ksb, key_rows, vwb, vwh, vsb, value_rows, pages_stride, part,
    HEADS: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, KEY_PAGE: tl.constexpr, VALUE_PAGE: tl.constexpr,
    KEY_LOG8: tl.constexpr, VALUE_LOG8: tl.constexpr, KEY_SQUARES: tl.constexpr, VALUE_SQUARES: tl.constexpr,
    CENTRED: tl.constexpr, TABLE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """keys, values [B, H, T, D] (strides kb.. vt, D contiguous): tokens starts[b] .. starts[b] + counts[b] - 1 of the cache."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    is_value = head >= HEADS
    start, count = tl.load(starts + batch), tl.load(counts + batch)
    base, last = start // 32 + 4 * tl.program_id(0), (start + count + 31) // 32
    if (count > 0) & (base < last):
        at_head = tl.where(is_value, head - HEADS, head)
        source = tl.where(is_value, values + batch * vb + at_head * vh, keys + batch * kb + at_head * kh)
        words = tl.where(is_value, value_words + batch * vwb + at_head * vwh, key_words + batch * kwb + at_head * kwh)
        sides = tl.where(is_value, value_sides + batch * vsb, key_sides + batch * ksb)
        page_words, page_sides = tl.where(is_value, VALUE_PAGE, KEY_PAGE), tl.where(is_value, value_rows, key_rows) * 32
        squares, log8 = tl.where(is_value, VALUE_SQUARES, KEY_SQUARES), tl.where(is_value, VALUE_LOG8, KEY_LOG8)
        row, d, p, p8 = tl.arange(0, 128), tl.arange(0, DIM), tl.arange(0, 32), tl.arange(0, 8)
        slot = 16 * (row // 64) + row % 16
        token = base * 32 + 32 * (row // 16 % 4) + slot - start
        fresh = (token >= 0) & (token < count)
        x = tl.load(source + token.to(tl.int64)[:, None] * tl.where(is_value, vt, kt) + d[None, :], mask=fresh[:, None], other=0)
        # The interpreter multiplies no bfloat16; and what is loaded and nothing else would be an operand in shared memory.
        x = tl.where(fresh[:, None], x, 0.0) if ASM else x.to(tl.float32)
        weight = tl.where(fresh, 1 << (8 * (row // 64) + row // 8 % 2 * 2), 0)[:, None]
        of_page, page = base + row // 16 % 4, base + tl.arange(0, 4)
        inside = page < last
        if TABLE:
            of_page = tl.load(pages + batch * pages_stride + of_page, mask=fresh, other=0)
            page = tl.load(pages + batch * pages_stride + page, mask=inside, other=0)
        sides += of_page.to(tl.int64) * page_sides + slot
        at_page = words + page.to(tl.int64) * page_words
        begun = tl.where(tl.program_id(0) == 0, start % 32, 0)
        rows, means = rotation + head * (DIM + 32) * DIM + p[:, None] * DIM + d[None, :], shift + head * (DIM + 32) + p
        rows8, means8 = rotation + head * (DIM + 32) * DIM + p8[:, None] * DIM + d[None, :], shift + head * (DIM + 32) + p8
        for g in range(GROUPS):
            at = groups + (head * GROUPS + g) * 4
            first, end, side, size = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
            sums, y, y8 = tl.zeros([128, 8], tl.float32), tl.zeros([128, 32], tl.float32), tl.zeros([128, 8], tl.float32)
            for t in range(end - first):  # backwards: the first stays
                info = tiles + (head * TILES + end - 1 - t) * 8
                here, place = tl.load(info + 4), tl.load(info + 5)
                if here > 8:
                    y = _turned(x, rows + place * DIM, means + place, part, CENTRED, ASM)
                    if here < 32:
                        y = tl.where((p < here)[None, :], y, 0.0)
                    sums += _eight(y * y)
                else:
                    y8 = tl.where((p8 < here)[None, :], _turned(x, rows8 + place * DIM, means8 + place, part, CENTRED, ASM), 0.0)
                    sums += y8 * y8
            whole = tl.sum(sums, 1)
            down = tl.where(whole > 0, -tl.sqrt(size.to(tl.float32)) * tl.rsqrt(whole), 0.0)[:, None]
            power, inner = tl.zeros([128, 8], tl.float32), tl.zeros([128, 8], tl.float32)
            for t in range(first, end):
                info = tiles + (head * TILES + t) * 8
                width, word, here, place = tl.load(info), tl.load(info + 1), tl.load(info + 4), tl.load(info + 5)
                book = heap + tl.load(info + 3)
                if here > 8:
                    if t > first:
                        y = _turned(x, rows + place * DIM, means + place, part, CENTRED, ASM)
                    v = y * down + 0.0  # never -0.0: its sign says whether y is positive
                    sign = v.to(tl.int32, bitcast=True) >> 31
                    if width == 3:
                        level = level_of(v, book, 3, True, ASM)
                        code = (level.to(tl.int32, bitcast=True) ^ sign) & 19
                    elif width == 2:
                        level = level_of(v, book, 2, True, ASM)
                        code = (level.to(tl.int32, bitcast=True) ^ sign) & 3
                    elif width == 4:
                        level = level_of(v, book, 4, True, ASM)
                        code = (level.to(tl.int32, bitcast=True) ^ sign) & 51
                    else:
                        level = level_of(v, book, 1, True, ASM)
                        code = (level.to(tl.int32, bitcast=True) ^ sign) & 16
                    put(at_page + word, words_of(_fields(code, weight), width % 2 == 1, False, 32, ASM), width, size, here, begun, inside)
                    if here < 32:
                        level = tl.where((p < here)[None, :], level, 0.0)
                    power += _eight(level * level)
                    if KEY_SQUARES or VALUE_SQUARES:
                        inner += _eight(level * tl.abs(y))
                else:
                    if t > first:
                        y8 = _turned(x, rows8 + place * DIM, means8 + place, part, CENTRED, ASM)
                    v8 = y8 * down + 0.0
                    sign8 = v8.to(tl.int32, bitcast=True) >> 31
                    node = tl.full([128, 8], 1, tl.int32)
                    for _ in range(1, width):
                        node = 2 * node + (tl.abs(v8) > _at(book + node, ASM)).to(tl.int32)
                    level8 = tl.where((p8 < here)[None, :], _at(book + node, ASM), 0.0)
                    code8 = (node ^ ~sign8) & ((1 << width) - 1)
                    low = tl.where(width == 1, code8 << 4, code8 & 3 | (code8 & 12) << 2)
                    narrow = tl.minimum(width, 4)
                    put(at_page + word, words_of(_fields(low, weight), narrow % 2 == 1, False, 8, ASM), narrow, size, here, begun, inside)
                    if width > 4:
                        high = code8 >> 4
                        high = tl.where(width == 5, high << 4, high & 3 | (high & 12) << 2)
                        put(at_page + word + 4 * size, words_of(_fields(high, weight), width % 2 == 1, False, 8, ASM), width - 4, size, here, begun, inside)
                    power += level8 * level8
                    if KEY_SQUARES or VALUE_SQUARES:
                        inner += level8 * tl.abs(y8)
            gain = tl.sqrt(whole) * tl.rsqrt(tl.sum(power, 1))
            if KEY_SQUARES or VALUE_SQUARES:
                gain = tl.where(squares, tl.sum(inner, 1) / tl.sum(power, 1), gain)
            if KEY_LOG8 or VALUE_LOG8:
                byte = tl.floor(8 * tl.log2(tl.maximum(gain, 2.0**-30)) + 0.5) + 128
                gain = tl.where(log8, tl.minimum(tl.maximum(byte, 0.0), 255.0), gain)
            if end > first:
                tl.store(sides + side * 32, gain.to(sides.dtype.element_ty), mask=fresh)
