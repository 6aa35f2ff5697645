"""Triton: prompts of heads that are one segment of 1 to 4 bits with levels symmetric about zero, keys and values in one launch.

A program of four warps keeps a head's rotation in shared memory and codes 128 tokens after the other. Tokens are the rows of the product,
so a token's norm and gain are sums within a quad of lanes; rows are ordered so that a warp holds whole pages: four tokens of a lane are
tokens j, j + 8, j + 16 and j + 24 of one page. Codes leave the lanes as fields of 16 bits and become words in registers, by a transposed
8 x 8 matrix and two shuffles.

`rotation` [2, heads, D, D]: matrices of the tokens' type that add up to it. `books` [.., 16] per head: thresholds of the magnitude by bisection,
node n's children at 2 n and 2 n + 1, then its 2**(WIDTH - 1) levels as leaves; their lowest bits are the code of the negative level, see `kernels.encode`.
"""

import triton
import triton.language as tl

_ROUND = tl.constexpr("{ .reg .b32 a, b; shfl.sync.bfly.b32 a, $1, 1, 31, -1; prmt.b32 b, $1, a, $2; shfl.sync.bfly.b32 a, b, 2, 31, -1; prmt.b32 $0, b, a, $3; }")


# As assembly a value is done before the next begins.
_EIGHT = tl.constexpr("""{ .reg .pred p, q; .reg .f32 u, t, a, b; abs.f32 u, $1; setp.gt.f32 p, u, $2; selp.f32 t, $4, $3, p; setp.gt.f32 q, u, t;
selp.f32 a, $8, $6, p; selp.f32 b, $7, $5, p; selp.f32 $0, a, b, q; }""")
# Signs as masks, where the compiler would compare many values first and keep the outcomes, more than there are predicates, as bits.
_SIXTEEN = tl.constexpr("""{ .reg .b32 p, q, r, s, t, a, b; .reg .f32 u, e; abs.f32 u, $1;
sub.f32 e, $2, u; mov.b32 p, e; shr.s32 p, p, 31; lop3.b32 t, p, $4, $3, 0xCA; sub.f32 e, t, u; mov.b32 q, e; shr.s32 q, q, 31;
lop3.b32 s, p, $8, $6, 0xCA; lop3.b32 t, p, $7, $5, 0xCA; lop3.b32 t, q, s, t, 0xCA; sub.f32 e, t, u; mov.b32 r, e; shr.s32 r, r, 31;
lop3.b32 a, p, $15, $11, 0xCA; lop3.b32 b, p, $13, $9, 0xCA; lop3.b32 b, q, a, b, 0xCA;
lop3.b32 s, p, $16, $12, 0xCA; lop3.b32 t, p, $14, $10, 0xCA; lop3.b32 s, q, s, t, 0xCA; lop3.b32 $0, r, s, b, 0xCA; }""")


@triton.jit
def level_of(v, book, WIDTH: tl.constexpr, MASKS: tl.constexpr, ASM: tl.constexpr):
    """The level nearest to the magnitude of v. MASKS: 4 bits without predicates."""
    if WIDTH == 1:
        level = tl.load(book + 1) + tl.zeros_like(v)
    elif WIDTH == 2:
        level = tl.where(tl.abs(v) > tl.load(book + 1), tl.load(book + 3), tl.load(book + 2))
    elif ASM and (WIDTH == 3 or MASKS):
        zero = tl.zeros_like(v)
        args = [v, tl.load(book + 1) + zero, tl.load(book + 2) + zero, tl.load(book + 3) + zero, tl.load(book + 4) + zero]
        args += [tl.load(book + 5) + zero, tl.load(book + 6) + zero, tl.load(book + 7) + zero]
        if WIDTH == 3:
            level = tl.inline_asm_elementwise(_EIGHT, "=f,f,f,f,f,f,f,f,f", args, dtype=tl.float32, is_pure=True, pack=1)
        else:
            args += [tl.load(book + 8) + zero, tl.load(book + 9) + zero, tl.load(book + 10) + zero, tl.load(book + 11) + zero]
            args += [tl.load(book + 12) + zero, tl.load(book + 13) + zero, tl.load(book + 14) + zero, tl.load(book + 15) + zero]
            level = tl.inline_asm_elementwise(_SIXTEEN, "=f" + 16 * ",f", args, dtype=tl.float32, is_pure=True, pack=1)
    else:
        u = tl.abs(v)
        upper = u > tl.load(book + 1)
        above = u > tl.where(upper, tl.load(book + 3), tl.load(book + 2))
        if WIDTH == 3:
            level = tl.where(above, tl.where(upper, tl.load(book + 7), tl.load(book + 5)), tl.where(upper, tl.load(book + 6), tl.load(book + 4)))
        else:
            most = u > tl.where(above, tl.where(upper, tl.load(book + 7), tl.load(book + 5)), tl.where(upper, tl.load(book + 6), tl.load(book + 4)))
            odd = tl.where(above, tl.where(upper, tl.load(book + 15), tl.load(book + 11)), tl.where(upper, tl.load(book + 13), tl.load(book + 9)))
            even = tl.where(above, tl.where(upper, tl.load(book + 14), tl.load(book + 10)), tl.where(upper, tl.load(book + 12), tl.load(book + 8)))
            level = tl.where(most, odd, even)
    return level


@triton.jit
def words_of(fields, odd, PAIRS: tl.constexpr, DIM: tl.constexpr, ASM: tl.constexpr):
    """Words [4 pages, 8, D / 8, 4]: word k of position 8 n + a at [:, a, n, k], from fields [4 pages, 8 tokens, D] of 16 bits.

    Words 0 and 1 are the first plane of two bits. Words 2 and 3 are the second, or, `odd`, word 2 is the last bit. PAIRS: there is one plane of two bits and no more.
    """
    e, lane = tl.arange(0, 2), tl.arange(0, 4)
    if ASM:
        pairs = tl.sum(tl.reshape(fields, [4, 8, DIM // 8, 4, 2]) << (16 * e), 4)
        pairs = tl.inline_asm_elementwise("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [pairs], dtype=tl.int32, is_pure=True, pack=1)
    else:
        pairs = tl.sum(tl.reshape(fields, [4, 4, 2, DIM // 8, 8]) << (16 * e)[:, None, None], 2)
        pairs = tl.permute(pairs, (0, 3, 2, 1))
    part = pairs & 0x0F0F0F0F
    part = (part | (part >> 12)) & 0xFFFF
    if not PAIRS:
        high = (pairs >> 4) & 0x0F0F0F0F
        if odd:
            high = (high | (high >> 1)) & 0x03030303
            high = (high | (high >> 6)) & 0x000F000F
        part |= (high | (high >> 12)) << 16
    if ASM:
        first, second = tl.where(lane % 2 == 0, 0x6240, 0x3715), tl.where(lane < 2, 0x5410, 0x3276)
        none = tl.zeros_like(part)
        return tl.inline_asm_elementwise(_ROUND, "=r,r,r,r", [part, none + first, none + second], dtype=tl.int32, is_pure=True, pack=1)
    byte = (part[:, :, :, :, None] >> (8 * lane)) & 0xFF
    return tl.sum(byte << (8 * lane)[:, None], 3)


@triton.jit
def put(pages, found, width, n, size, begun, inside):
    """Store `found`, as :func:`words_of` gives it, where pages [4] begin a segment of n channels, for `size` positions of pages `inside`.

    In the first page the bits of `begun` tokens stay.
    """
    a, at, k = tl.arange(0, 8), tl.arange(0, found.shape[2]), tl.arange(0, 4)
    odd = width % 2 == 1
    position = (8 * at[:, None] + a[None, :]).trans(1, 0)  # [8, D / 8]
    row = tl.where(k < 2, k + tl.where(width == 1, 1, 0), tl.where(odd, width - 3 + k, k))  # from `width` on where there is no such word
    target = pages[:, None, None, None] + (position[:, :, None] + (row * n)[None, None, :])[None]
    mask = inside[:, None, None, None] & ((position < size)[:, :, None] & (row < width)[None, None, :])[None]
    if begun > 0:
        slot = tl.arange(0, 32)[None, :]
        last = tl.where(k[:, None] == 2, 1 << (4 * (slot % 8) + slot // 8), 0)
        pair = tl.where(k[:, None] % 2 == slot // 16, 3 << (4 * (slot % 8) + slot // 8 % 2 * 2), 0)
        keep = tl.sum(tl.where(slot < begun, tl.where((k > 1)[:, None] & odd, last, pair), 0), 1)
        keep = tl.where(tl.arange(0, 4)[:, None] == 0, keep[None, :], 0)[:, None, None, :] + tl.zeros_like(found)
        found |= tl.load(target, mask=mask & (keep != 0), other=0) & keep
    tl.store(target, found, mask=mask)


@triton.jit
def encode_whole(
    keys, values, key_words, key_sides, value_words, value_sides, rotation, shift, rows, books, starts, counts, pages,
    kb, kh, kt, vb, vh, vt, kwb, kwh, ksb, key_rows, vwb, vwh, vsb, value_rows, pages_stride, part,
    HEADS: tl.constexpr, DIM: tl.constexpr, KEY_PAGE: tl.constexpr, VALUE_PAGE: tl.constexpr, WIDTH: tl.constexpr,
    KEY_LOG8: tl.constexpr, VALUE_LOG8: tl.constexpr, KEY_SQUARES: tl.constexpr, VALUE_SQUARES: tl.constexpr,
    CENTRED: tl.constexpr, TABLE: tl.constexpr, ASM: tl.constexpr,
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
    at = 8 * (row // 64) + row // 8 % 2 * 2  # of a field
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
            # The next step's tokens on their way to L2
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
        fields = tl.sum(tl.sum(tl.reshape(fields, [2, 4, 2, 8, DIM]), 2), 0)
        page = base + tl.arange(0, 4)
        inside = page < last
        if TABLE:
            page = tl.load(pages + batch * pages_stride + page, mask=inside, other=0)
        begun = tl.where(tile == 0, start % 32, 0)
        put(words + page.to(tl.int64) * page_words, words_of(fields, WIDTH % 2 == 1, WIDTH == 2, DIM, ASM), WIDTH, DIM, DIM, begun, inside)
