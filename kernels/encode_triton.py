"""Triton: rotation, norm, nearest level, gain, packing and appending, for all heads of keys and values in one launch.

:func:`encode_pages` codes a prompt: a program of one warp takes one page of one head, 16 stored positions after the other. Positions are rows and tokens
columns, so that the tokens of a word lie in one quad of lanes. :func:`encode_token` codes one token of each sequence: all positions of a head at
once, nothing in sequence but the bisection.

`matrix` [PARTS, heads, D + 16, D]: rotations by stored position as sums of PARTS matrices of the tokens' type, part p times SCALE**-p; float32 has one.
`heap`: per width of a stream thresholds in the order of bisection, node n's children at 2 n and 2 n + 1, the levels as leaves. `tiles` [.., 8]: width,
first word, channels of the segment, heap, positions, first position. `groups` [.., 4]: first tile, last + 1, row of sides, channels. `places` [.., 8]:
width, heap, word, channels of the segment, group. Heads: keys' first, then values'.
"""

import triton
import triton.language as tl


@triton.jit
def _turned(x, rows, shift, part, SCALE: tl.constexpr, PARTS: tl.constexpr):
    """16 rows of a rotation times x [D, T] minus shift, float32; no product of float16 or bfloat16 tokens is rounded."""
    y = tl.zeros([16, x.shape[1]], tl.float32)
    for p in tl.static_range(PARTS):
        y = y * SCALE - tl.load(shift)[:, None] if p == PARTS - 1 else y * SCALE
        y = tl.dot(tl.load(rows + (PARTS - 1 - p) * part).to(x.dtype), x, acc=y, input_precision="ieee")
    return y


@triton.jit
def _at(pointer, ASM: tl.constexpr):
    """Floats from anywhere. As assembly it is elementwise to the compiler, which would otherwise lay the addresses out anew for a load."""
    if ASM:
        return tl.inline_asm_elementwise("ld.global.nc.f32 $0, [$1];", "=f,l", [pointer], dtype=tl.float32, is_pure=True, pack=1)
    return tl.load(pointer)


@triton.jit
def _leaf(u, book, width, ASM: tl.constexpr):
    """The leaf of the level nearest to u: three steps among seven thresholds that all lanes share, the others by address."""
    first, second, third = tl.load(book + 1), tl.load(book + 2), tl.load(book + 3)
    if width > 2:
        upper = u > first
        above = u > tl.where(upper, third, second)
        high, low = tl.where(above, tl.load(book + 7), tl.load(book + 6)), tl.where(above, tl.load(book + 5), tl.load(book + 4))
        node = tl.where(upper, 12, 8) + tl.where(above, 2, 0) + (u > tl.where(upper, high, low)).to(tl.int32)
    else:
        node = 2 + (u > first).to(tl.int32)
        if width > 1:
            node = 2 * node + (u > tl.where(node > 2, third, second)).to(tl.int32)
    for _ in range(3, width):
        node = 2 * node + (u > _at(book + node, ASM)).to(tl.int32)
    return node


@triton.jit
def _gain(norm, power, inner, squares, log8):
    """The gain that is stored, float32: of least squares or of equal norm, as it is or as eight steps per octave."""
    gain = tl.where(squares, inner / power, norm / tl.sqrt(power))
    byte = tl.floor(8 * tl.log2(tl.maximum(gain, 2.0**-30)) + 0.5) + 128
    return tl.where(log8, tl.minimum(tl.maximum(byte, 0.0), 255.0), gain)


@triton.jit
def _put(target, bits, keep, inside):
    """Words whose other tokens' bits, of a page begun, stay."""
    keep = keep + tl.zeros([16], tl.int32)
    old = tl.load(target, mask=inside & (keep != 0), other=0) & keep
    tl.store(target, tl.sum(bits, 1) | old, mask=inside)


@triton.jit
def encode_pages(
    keys, values, key_words, key_sides, value_words, value_sides, matrix, shift, mean, tiles, groups, places, heap, starts, counts, pages,
    kb, kh, kt, vb, vh, vt, kwb, kwh, ksb, key_rows, vwb, vwh, vsb, value_rows, pages_stride, part,
    HEADS: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, KEY_PAGE: tl.constexpr, VALUE_PAGE: tl.constexpr,
    KEY_LOG8: tl.constexpr, VALUE_LOG8: tl.constexpr, KEY_SQUARES: tl.constexpr, VALUE_SQUARES: tl.constexpr,
    PARTS: tl.constexpr, SCALE: tl.constexpr, WIDEST: tl.constexpr, TABLE: tl.constexpr, G: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """keys, values [B, H, T, D] (strides kb.. vt, D contiguous): tokens starts[b] .. starts[b] + counts[b] - 1 of the cache."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    is_value = head >= HEADS
    start, count = tl.load(starts + batch), tl.load(counts + batch)
    page = start // 32 + tl.program_id(0)
    if (count > 0) & (page * 32 < start + count):
        slot, row, d = tl.arange(0, 32), tl.arange(0, 16), tl.arange(0, DIM)
        token = page * 32 + slot - start
        at_page = (tl.load(pages + batch * pages_stride + page) if TABLE else page).to(tl.int64)
        fresh, old = (token >= 0) & (token < count), token < 0
        # Selected, not branched: what is known of alignment survives.
        at_head = tl.where(is_value, head - HEADS, head)
        source = tl.where(is_value, values + batch * vb + at_head * vh, keys + batch * kb + at_head * kh) + token.to(tl.int64) * tl.where(is_value, vt, kt)
        of_key, of_value = key_words + batch * kwb + at_head * kwh + at_page * KEY_PAGE, value_words + batch * vwb + at_head * vwh + at_page * VALUE_PAGE
        words = tl.where(is_value, of_value, of_key)
        sides = tl.where(is_value, value_sides + batch * vsb + at_page * value_rows * 32, key_sides + batch * ksb + at_page * key_rows * 32) + slot
        x = tl.load(source[:, None] + d[None, :], mask=fresh[:, None], other=0)
        centred = x.to(tl.float32) - tl.load(mean + head * DIM + d)[None, :]
        whole = tl.sum(centred * centred, 1)
        x = tl.trans(x if ASM else x.to(tl.float32))  # the interpreter multiplies no bfloat16
        pair_at, one_at = 4 * (slot % 8) + 2 * (slot // 8 % 2), 4 * (slot % 8) + slot // 8
        earlier = slot < 16
        one, first, later = tl.where(fresh, 1, 0)[None, :], tl.where(fresh & earlier, 3, 0)[None, :], tl.where(fresh & ~earlier, 3, 0)[None, :]
        keep_one = tl.sum(tl.where(old, 1 << one_at, 0), 0)
        keep_first, keep_later = tl.sum(tl.where(old & earlier, 3 << pair_at, 0), 0), tl.sum(tl.where(old & ~earlier, 3 << pair_at, 0), 0)
        pair_at, one_at = pair_at[None, :], one_at[None, :]
        rows = matrix + head * (DIM + 16) * DIM + row[:, None] * DIM + d[None, :]
        means = shift + head * (DIM + 16) + row
        squares, log8 = tl.where(is_value, VALUE_SQUARES, KEY_SQUARES), tl.where(is_value, VALUE_LOG8, KEY_LOG8)
        for g in range(GROUPS):
            at = groups + (head * GROUPS + g) * 4
            begin, end, side, size = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
            if end > begin:
                norm = whole
                if size < DIM:  # turned twice: tensor cores have time, registers for all positions there are none
                    sums = tl.zeros([16, 32], tl.float32)
                    for t in range(begin, end):
                        info = tiles + (head * TILES + t) * 8
                        here, place = tl.load(info + 4), tl.load(info + 5)
                        y = _turned(x, rows + place * DIM, means + place, part, SCALE, PARTS)
                        sums += tl.where((row < here)[:, None], y * y, 0.0)
                    norm = tl.sum(sums, 0)
                norm = tl.sqrt(norm)
                up = tl.where(norm > 0, tl.sqrt(size.to(tl.float32)) / tl.where(norm > 0, norm, 1.0), 0.0)[None, :]
                power, inner = tl.zeros([16, 32], tl.float32), tl.zeros([16, 32], tl.float32)
                for t in range(begin, end):
                    info = tiles + (head * TILES + t) * 8
                    width, word, n, here, place = tl.load(info), tl.load(info + 1), tl.load(info + 2), tl.load(info + 4), tl.load(info + 5)
                    book = heap + tl.load(info + 3)
                    y = _turned(x, rows + place * DIM, means + place, part, SCALE, PARTS)
                    node = _leaf(y * up, book, width, ASM)
                    inside = row < here
                    level = tl.where(inside[:, None], _at(book + node, ASM), 0.0)
                    power += level * level
                    inner += level * y
                    target = words + word + row
                    for a in range(width // 2):
                        pair = node >> (2 * a)
                        _put(target + 2 * a * n, (pair & first) << pair_at, keep_first, inside)
                        _put(target + (2 * a + 1) * n, (pair & later) << pair_at, keep_later, inside)
                    if width % 2 == 1:
                        _put(target + (width - 1) * n, ((node >> (width - 1)) & one) << one_at, keep_one, inside)
                gain = _gain(norm, tl.sum(power, 0), tl.sum(inner, 0), squares, log8)
                tl.store(sides + side * 32, gain.to(sides.dtype.element_ty), mask=fresh)


@triton.jit
def encode_token(
    keys, values, key_words, key_sides, value_words, value_sides, matrix, shift, mean, tiles, groups, places, heap, starts, counts, pages,
    kb, kh, kt, vb, vh, vt, kwb, kwh, ksb, key_rows, vwb, vwh, vsb, value_rows, pages_stride, part,
    HEADS: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, KEY_PAGE: tl.constexpr, VALUE_PAGE: tl.constexpr,
    KEY_LOG8: tl.constexpr, VALUE_LOG8: tl.constexpr, KEY_SQUARES: tl.constexpr, VALUE_SQUARES: tl.constexpr,
    PARTS: tl.constexpr, SCALE: tl.constexpr, WIDEST: tl.constexpr, TABLE: tl.constexpr, G: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The same for T = 1 where counts[b] is 1. One launch serves both kernels, so each leaves some arguments unread. G: the groups' number as a power of two."""
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    is_value = head >= HEADS
    if tl.load(counts + batch) > 0:
        start, p, g = tl.load(starts + batch), tl.arange(0, DIM), tl.arange(0, G)
        slot, page = start % 32, start // 32
        page = tl.load(pages + batch * pages_stride + page) if TABLE else page
        if is_value:
            source = values + batch * vb + (head - HEADS) * vh
            words = value_words + batch * vwb + (head - HEADS) * vwh + page.to(tl.int64) * VALUE_PAGE
            sides = value_sides + batch * vsb + page.to(tl.int64) * value_rows * 32 + slot
        else:
            source = keys + batch * kb + head * kh
            words = key_words + batch * kwb + head * kwh + page.to(tl.int64) * KEY_PAGE
            sides = key_sides + batch * ksb + page.to(tl.int64) * key_rows * 32 + slot
        rows = matrix + head * (DIM + 16) * DIM + p[:, None] * DIM + p[None, :]
        rotation = tl.load(rows + (PARTS - 1) * part).to(tl.float32)
        for i in tl.static_range(1, PARTS):
            rotation = rotation * SCALE + tl.load(rows + (PARTS - 1 - i) * part).to(tl.float32)
        y = tl.sum(rotation * tl.load(source + p).to(tl.float32)[None, :], 1) - tl.load(shift + head * (DIM + 16) + p)
        at = places + (head * DIM + p) * 8
        width, book, word, n, group = tl.load(at), heap + tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
        at = groups + (head * GROUPS + g) * 4
        side, size = tl.load(at + 2, mask=g < GROUPS, other=0), tl.load(at + 3, mask=g < GROUPS, other=0)
        mine = group[None, :] == g[:, None]
        norm = tl.sqrt(tl.sum(tl.where(mine, (y * y)[None, :], 0.0), 1))
        up = tl.where(norm > 0, tl.sqrt(size.to(tl.float32)) / tl.where(norm > 0, norm, 1.0), 0.0)
        u = y * tl.sum(tl.where(mine, up[:, None], 0.0), 0)
        node = tl.full([DIM], 1, tl.int32)
        for i in tl.static_range(WIDEST):
            node = tl.where(i < width, 2 * node + (u > tl.load(book + node)).to(tl.int32), node)
        level = tl.load(book + node)
        power = tl.sum(tl.where(mine, (level * level)[None, :], 0.0), 1)
        inner = tl.sum(tl.where(mine, (level * y)[None, :], 0.0), 1)
        gain = _gain(norm, power, inner, tl.where(is_value, VALUE_SQUARES, KEY_SQUARES), tl.where(is_value, VALUE_LOG8, KEY_LOG8))
        tl.store(sides + side * 32, gain.to(sides.dtype.element_ty), mask=size > 0)
        half, pair_at, one_at = slot // 16, 4 * (slot % 8) + 2 * (slot // 8 % 2), 4 * (slot % 8) + slot // 8
        for a in tl.static_range(WIDEST // 2):
            target, inside = words + word + (2 * a + half) * n, a < width // 2
            others = tl.load(target, mask=inside, other=0) & ~(3 << pair_at)
            tl.store(target, others | (((node >> (2 * a)) & 3) << pair_at), mask=inside)
        target, inside = words + word + (width - 1) * n, width % 2 == 1
        others = tl.load(target, mask=inside, other=0) & ~(1 << one_at)
        tl.store(target, others | (((node >> (width - 1)) & 1) << one_at), mask=inside)
