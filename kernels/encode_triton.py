"""Triton: norm, rotation, nearest level, gain, packing and appending, for all heads of keys and values in one launch.

A program codes one page of one head: its 32 tokens against tiles of 16 stored positions, as in `kernels.paged_triton`. Old tokens of a page
begun keep their bits. `tiles` as there, `groups` [.., 4]: first tile, last + 1, row of sides, channels; keys' heads first, then values'.
"""

import triton
import triton.language as tl


@triton.jit
def _turned(x, matrix, low, shift, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """x [32, D] times 16 rows of a float32 rotation. SPLIT: float16 x is exact, the rotation is a sum of two float16 matrices.

    PRECISION otherwise: tf32x3 (bfloat16 x is exact in tf32, the rotation becomes a sum) or ieee.
    """
    if SPLIT:  # noqa: SIM108
        y = tl.dot(x, tl.load(matrix).to(tl.float16)) + tl.dot(x, tl.load(low)) * (1.0 / 4096)
    else:
        y = tl.dot(x.to(tl.float32), tl.load(matrix), input_precision=PRECISION)
    return y - tl.load(shift)[None, :]


@triton.jit
def encode_pages(
    keys, values, key_words, key_sides, value_words, value_sides, matrix, low, shift, member, mean, tiles, groups, levels, starts, counts, pages,
    kb, kh, kt, vb, vh, vt, kwb, kwh, ksb, key_rows, vwb, vwh, vsb, value_rows, pages_stride,
    HEADS: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, KEY_PAGE: tl.constexpr, VALUE_PAGE: tl.constexpr,
    KEY_LOG8: tl.constexpr, VALUE_LOG8: tl.constexpr, KEY_SQUARES: tl.constexpr, VALUE_SQUARES: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """keys, values [B, H, T, D] (strides kb.. vt, D contiguous): tokens starts[b] .. starts[b] + counts[b] - 1 of the cache."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    is_value = head >= HEADS
    start, count = tl.load(starts + batch), tl.load(counts + batch)
    page = start // 32 + tl.program_id(0)
    if page * 32 < start + count:
        slot, col, d = tl.arange(0, 32), tl.arange(0, 16), tl.arange(0, DIM)
        token = page * 32 + slot - start
        page = tl.load(pages + batch * pages_stride + page) if TABLE else page
        fresh = (token >= 0) & (token < count)
        if is_value:
            source = values + batch * vb + (head - HEADS) * vh + token.to(tl.int64) * vt
            words = value_words + batch * vwb + (head - HEADS) * vwh + page.to(tl.int64) * VALUE_PAGE
            sides = value_sides + batch * vsb + page.to(tl.int64) * value_rows * 32
        else:
            source = keys + batch * kb + head * kh + token.to(tl.int64) * kt
            words = key_words + batch * kwb + head * kwh + page.to(tl.int64) * KEY_PAGE
            sides = key_sides + batch * ksb + page.to(tl.int64) * key_rows * 32
        x = tl.load(source[:, None] + d[None, :], mask=fresh[:, None], other=0)
        centred = x.to(tl.float32) - tl.load(mean + head * DIM + d)[None, :]
        square = centred * centred
        within = slot % 8
        pair_at, one_at = (4 * within + 2 * (slot // 8 % 2))[:, None], (4 * within + slot // 8)[:, None]
        later = (slot >= 16)[:, None]
        old = (token < 0)[:, None]
        keep_first = tl.sum(tl.where(old & ~later, 3 << pair_at, 0), 0)
        keep_later = tl.sum(tl.where(old & later, 3 << pair_at, 0), 0)
        keep_one = tl.sum(tl.where(old, 1 << one_at, 0), 0)
        for g in range(GROUPS):
            at = groups + (head * GROUPS + g) * 4
            begin, end, row, size = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
            if end > begin:
                norm = tl.sqrt(tl.sum(square * tl.load(member + (head * GROUPS + g) * DIM + d)[None, :], 1))
                up = tl.where(norm > 0, tl.sqrt(size.to(tl.float32)) / tl.where(norm > 0, norm, 1.0), 0.0)
                power, inner = tl.zeros([32], tl.float32), tl.zeros([32], tl.float32)
                for t in range(begin, end):
                    info = tiles + (head * TILES + t) * 16
                    width, first, n, book, here = tl.load(info), tl.load(info + 1), tl.load(info + 2), tl.load(info + 3), tl.load(info + 4)
                    place = (head * TILES + t) * 16
                    at_matrix = (place + col)[None, :] * DIM + d[:, None]
                    y = _turned(x, matrix + at_matrix, low + at_matrix, shift + place + col, SPLIT, PRECISION)
                    u = y * up[:, None]
                    code = tl.zeros([32, 16], tl.int32)
                    for i in range(width):  # bisection: the number of thresholds below u
                        step = 1 << (width - 1 - i)
                        under = levels + book + code + step
                        threshold = (tl.load(under) + tl.load(under - 1)) * 0.5
                        code = tl.where(u > threshold, code + step, code)
                    held = (col < here)[None, :]
                    level = tl.where(held, tl.load(levels + book + code), 0.0)
                    power += tl.sum(level * level, 1)
                    inner += tl.sum(level * y, 1)
                    code = tl.where(fresh[:, None] & held, code, 0)
                    target = words + first + col
                    inside = col < here
                    for a in range(width // 2):
                        bits = ((code >> (2 * a)) & 3) << pair_at
                        word = target + 2 * a * n
                        new = tl.sum(tl.where(later, 0, bits), 0) | (tl.load(word, mask=inside, other=0) & keep_first)
                        tl.store(word, new, mask=inside)
                        new = tl.sum(tl.where(later, bits, 0), 0) | (tl.load(word + n, mask=inside, other=0) & keep_later)
                        tl.store(word + n, new, mask=inside)
                    if width % 2 == 1:
                        word = target + (width - 1) * n
                        new = tl.sum(((code >> (width - 1)) & 1) << one_at, 0) | (tl.load(word, mask=inside, other=0) & keep_one)
                        tl.store(word, new, mask=inside)
                squares = tl.where(is_value, VALUE_SQUARES, KEY_SQUARES)
                gain = tl.where(squares, inner / power, norm / tl.sqrt(power))
                byte = tl.floor(8 * tl.log2(tl.maximum(gain, 2.0**-30)) + 0.5) + 128
                byte = tl.minimum(tl.maximum(byte, 0.0), 255.0)
                place_side = sides + row * 32 + slot
                tl.store(place_side, tl.where(tl.where(is_value, VALUE_LOG8, KEY_LOG8), byte, gain).to(sides.dtype.element_ty), mask=fresh)
