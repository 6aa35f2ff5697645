"""Triton: decode attention over pages of scalar codes, all heads in one launch, split over tokens.

A program is one warp with ROWS rows of 8 tokens: row r of a word tile is tokens 8 r + j for j = 0..7 (`kernels.pages`). Keys are the left
operand of the scores S_j = K_j q^T [ROWS, G], q rotated once before; values are the left operand of O^T += V_j^T P_j, in rotated space.
Eight of everything (one per j) is a tuple. `groups` [H, GROUPS, 16] int32, one per segment: first tile of 16 channels, last + 1, row of
sides, width, first word, channels, first level, segments of the head, 8 words of level bytes. A tile that ends inside another segment meets zeros in q.
"""

import triton
import triton.language as tl

from kernels import affine_triton
from kernels.nibbles_triton import high_nibbles, lane, lanes, levels, nibbles, table, wide_levels
from kernels.sides_triton import packed, sides, unpacked


@triton.jit
def _ask(words, table, first, last, PAGE: tl.constexpr, PAGES: tl.constexpr, TABLE: tl.constexpr):
    """Ask L2 for the first 2 KB of PAGES pages: each segment's loop begins with words that nothing read ahead."""
    i = tl.arange(0, 16 * PAGES)
    page = tl.minimum(first + i // 16, last)
    page = (tl.load(table + page) if TABLE else page).to(tl.int64)
    at = words + page * PAGE + tl.minimum(i % 16 * 32, PAGE - 1)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _dots(y, q, s):
    total = ()
    for j in tl.static_range(8):
        total = total + (tl.dot(y[j].to(q.dtype), q, s[j], input_precision="ieee"),)
    return total


@triton.jit
def _narrow(base, first, n, words, half, full, turn, slot, q, s, scale, least, WIDTH: tl.constexpr, ASM: tl.constexpr, CHANNELS: tl.constexpr, INTEGER: tl.constexpr):
    word = nibbles(base + first, half * n + full, full, turn, slot, n, min(WIDTH, 4), ASM)
    if WIDTH > 4:
        high = high_nibbles(base + first, half * n + full, full, turn, slot, n, WIDTH)
        y = wide_levels(word, high, words[0], words[1], WIDTH, ASM)
    elif INTEGER:
        y = affine_triton.levels(word, words, ASM)
    else:
        y = levels(word, words, WIDTH, ASM)
    if CHANNELS:
        factor, offset, x = tl.load(scale + first), tl.load(least + first), ()
        for j in tl.static_range(8):
            x = x + (y[j] * factor + offset,)
        y = x
    return _dots(y, q, s)


@triton.jit
def _gathered(base, half, full, turn, slot, n, books, width, ASM: tl.constexpr):
    """Levels of 5 to 8 bits, gathered from memory: rare, or a baseline that is not meant to be fast."""
    low = nibbles(base, half * n + full, full, turn, slot, n, 4, ASM)
    high = tl.zeros_like(low)
    if width > 5:
        high += (tl.load(base + half * n + full + 4 * n) >> turn) & 0x33333333
    if width == 8:
        high += ((tl.load(base + half * n + full + 6 * n) >> turn) & 0x33333333) * 4
    if width % 2 == 1:
        high += ((tl.load(base + full + (width - 1) * n) >> slot) & 0x11111111) * tl.where(width == 7, 4, 1)
    y = ()
    for j in tl.static_range(8):
        y = y + (tl.load(books + (((low >> (4 * j)) & 15) | (((high >> (4 * j)) & 15) << 4))),)
    return y


@triton.jit
def _segment(
    base, begin, end, first, n, words, half, full, turn, slot, q_at, s, scale, least,
    WIDTH: tl.constexpr, G: tl.constexpr, AHEAD: tl.constexpr, ASM: tl.constexpr, CHANNELS: tl.constexpr, UNROLL: tl.constexpr = 1, INTEGER: tl.constexpr = False,
):  # fmt: skip
    """Add the scores of one segment of WIDTH bits; its tiles are read AHEAD at a time. A loop, not unrolled: code must fit its cache."""
    for t in tl.range(begin, end, num_stages=AHEAD, loop_unroll_factor=UNROLL):
        s = _narrow(base, first + (t - begin) * 16, n, words, half, full, turn, slot, tl.load(q_at + t * 16 * G), s, scale, least, WIDTH, ASM, CHANNELS, INTEGER)
    return s


@triton.jit
def _weighed(total, s, gain):
    """total + s * gain per token, eight of each."""
    y = ()
    for j in tl.static_range(8):
        y = y + (total[j] + s[j] * gain[j][:, None],)
    return y


@triton.jit
def _scores(
    base, at, half, full, turn, slot, q_at, books, zero, s,
    WIDEST: tl.constexpr, G: tl.constexpr, ALIGN: tl.constexpr, AHEAD: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """s + scores of a segment of at most WIDEST bits, without its gain."""
    words = table(at + 8, zero)
    begin, end, width = tl.load(at), tl.load(at + 1), tl.load(at + 3)
    first, n = tl.multiple_of(tl.load(at + 4), ALIGN), tl.multiple_of(tl.load(at + 5), ALIGN)
    book = books + tl.load(at + 6)
    if width == 3:
        s = _segment(base, begin, end, first, n, words, half, full, turn, slot, q_at, s, base, base, 3, G, AHEAD, ASM, False)
    elif width == 2:
        s = _segment(base, begin, end, first, n, words, half, full, turn, slot, q_at, s, base, base, 2, G, AHEAD, ASM, False)
    elif width == 4:
        s = _segment(base, begin, end, first, n, words, half, full, turn, slot, q_at, s, base, base, 4, G, AHEAD, ASM, False)
    elif width == 1:
        s = _segment(base, begin, end, first, n, words, half, full, turn, slot, q_at, s, base, base, 1, G, AHEAD, ASM, False)
    elif WIDEST == 5:
        s = _segment(base, begin, end, first, n, (lanes(book, 5, ASM), book), half, full, turn, slot, q_at, s, base, base, 5, G, AHEAD, ASM, False)
    elif WIDEST > 5:
        if width == 5:
            s = _segment(base, begin, end, first, n, (lanes(book, 5, ASM), book), half, full, turn, slot, q_at, s, base, base, 5, G, AHEAD, ASM, False)
        elif width == 6:
            s = _segment(base, begin, end, first, n, (lanes(book, 6, ASM), book), half, full, turn, slot, q_at, s, base, base, 6, G, AHEAD, ASM, False)
        elif WIDEST > 6:
            for t in range(begin, end):
                y = _gathered(base + first + (t - begin) * 16, half, full, turn, slot, n, book, width, ASM)
                s = _dots(y, tl.load(q_at + t * 16 * G), s)
    return s


@triton.jit
def decode_split(
    query, aux, key_words, key_sides, value_words, value_sides, groups, books, value_table, value_books, shifts, first_visible, lengths, pages, out, stat,
    kb, kh, kb_side, key_rows, vb, vh, vb_side, value_rows, value_offset_row, key_offset_row, tokens_per_split, window, pages_stride,
    HEADS: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, DIM: tl.constexpr,
    KEY_PAGE: tl.constexpr, VALUE_PAGE: tl.constexpr, VTILE: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, KEY_LOG8: tl.constexpr,
    VALUE_LOG8: tl.constexpr, KEY_OFFSET: tl.constexpr, VALUE_OFFSET: tl.constexpr, KEY_BARE: tl.constexpr,
    VALUE_BARE: tl.constexpr, ALIGN: tl.constexpr, AHEAD: tl.constexpr, ASM: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, TABLE: tl.constexpr,
    UNROLL: tl.constexpr, VALUE_AHEAD: tl.constexpr, KEY_UNROLL: tl.constexpr, WIDEST: tl.constexpr, KEY_INTEGER: tl.constexpr, VALUE_INTEGER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out [B, H, splits, G, DIM], stat [B, H, splits, 2, G] float32: unnormalized outputs, maxima (base 2) and masses.

    A split without visible tokens writes its maximum, -inf, and its mass, 0, only.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    split, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length, visible = tl.load(lengths + batch), tl.load(first_visible + batch)
    visible = tl.maximum(visible, length - window)
    low = visible // (8 * ROWS) * (8 * ROWS) + split * tokens_per_split  # splits share what is visible
    high = tl.minimum(low + tokens_per_split, length)
    row, group = tl.arange(0, ROWS), tl.arange(0, G)
    col, chan = tl.arange(0, 16), tl.arange(0, VTILE)
    query += (batch * HEADS + head) * TILES * 16 * G
    aux += (batch * HEADS + head) * 2 * G + group
    key_words += batch * kb + head * kh
    value_words += batch * vb + head * vh
    key_sides += batch * kb_side
    value_sides += batch * vb_side
    groups += head * GROUPS * 16
    first_row, count = tl.load(groups + 2), tl.load(groups + 7)
    SIDE: tl.constexpr = key_sides.dtype.element_ty.primitive_bitwidth
    VALUE_SIDE: tl.constexpr = value_sides.dtype.element_ty.primitive_bitwidth
    zero = tl.load(shifts + lane(ASM)) >> 4
    value_levels = affine_triton.table(value_table, zero) if VALUE_INTEGER else table(value_table, zero)
    within = row % 4
    half, turn, slot = within // 2, tl.load(shifts + row), tl.load(shifts + ROWS + row)
    if EARLY:  # all that is read above was there before the query was turned
        tl.extra.cuda.gdc_wait()
    bias, query_sum = tl.load(aux), tl.load(aux + G)
    top, mass = tl.full([G], float("-inf"), tl.float32), tl.zeros([G], tl.float32)
    place = (batch * HEADS + head) * tl.num_programs(0) + split
    out += (place * G + group[None, :]) * DIM + chan[:, None]
    last = (high - 1) // 32
    for start in range(low, high, 8 * ROWS):
        if ASM and KEY_WIDTH == 0:
            _ask(key_words, pages + batch * pages_stride, start // 32, last, KEY_PAGE, ROWS // 4, TABLE)
        rows = start // 8 + row
        page = tl.minimum(rows // 4, last)  # rows behind the last token read its page again, masked below
        page = (tl.load(pages + batch * pages_stride + page) if TABLE else page).to(tl.int64)
        token = rows * 8
        key_full = (page * KEY_PAGE)[:, None] + col[None, :]
        key_side = key_sides + page * key_rows * 32 + within * 8
        value_side = value_sides + (page * value_rows + head * PARTS) * 32 + within * 8
        scale = key_sides + (page * key_rows * 32 + head * DIM)[:, None] + col[None, :]
        none = tl.zeros([ROWS, G], tl.float32)
        none = (none, none, none, none, none, none, none, none)
        later = ()  # gains of values, used behind the exponentials
        for part in tl.static_range(PARTS):
            later = later + (packed(value_side + part * 32, VALUE_BARE),)
        gains = packed(key_side + first_row * 32, KEY_BARE)
        q_at = query + col[:, None] * G + group[None, :]
        if KEY_WIDTH > 0:
            words = affine_triton.table(groups + 8, zero) if KEY_INTEGER else table(groups + 8, zero)
            t = _segment(
                key_words, 0, TILES, 0, TILES * 16, words, half[:, None], key_full, turn[:, None], slot[:, None], q_at, none,
                scale, scale + HEADS * DIM, KEY_WIDTH, G, AHEAD, ASM, CHANNELS, KEY_UNROLL, KEY_INTEGER,
            )  # fmt: skip
            t = _weighed(none, t, unpacked(gains, token, SIDE, KEY_LOG8, KEY_BARE))
        else:
            t = none
            for g in range(count):  # gains are read one segment ahead; the rest is not: what is carried through a loop loses its layout
                following = packed(key_side + tl.load(groups + tl.minimum(g + 1, count - 1) * 16 + 2) * 32, KEY_BARE)
                s = _scores(key_words, groups + g * 16, half[:, None], key_full, turn[:, None], slot[:, None], q_at, books, zero, none, WIDEST, G, ALIGN, AHEAD, ASM)
                t, gains = _weighed(t, s, unpacked(gains, token, SIDE, KEY_LOG8, KEY_BARE)), following
        if KEY_OFFSET:
            offset = sides(key_side + (key_offset_row + head) * 32, False)
        s = ()
        most = tl.full([ROWS, G], float("-inf"), tl.float32)
        for j in tl.static_range(8):
            x = t[j] + bias[None, :]
            if KEY_OFFSET:
                x += offset[j][:, None] * query_sum[None, :]
            x = tl.where(((token + j < high) & (token + j >= visible))[:, None], x, float("-inf"))
            s = s + (x,)
            most = tl.maximum(most, x)
        peak = tl.maximum(top, tl.max(most, 0))
        anchor = tl.where(peak == float("-inf"), 0.0, peak)
        decay = tl.exp2(top - anchor)
        w, sum = (), tl.zeros([ROWS, G], tl.float32)
        for j in tl.static_range(8):
            w = w + (tl.exp2(s[j] - anchor[None, :]),)
            sum += w[j]
        mass, top = mass * decay + tl.sum(sum, 0), peak
        full = (page * VALUE_PAGE)[None, :] + chan[:, None]
        for part in tl.static_range(PARTS):  # of the channels, each with gains of its own
            gain = unpacked(later[part], token, VALUE_SIDE, VALUE_LOG8, VALUE_BARE)
            if VALUE_OFFSET:
                offset = sides(value_side + (value_offset_row + part) * 32, False)
            p, sum = (), tl.zeros([ROWS, G], tl.float32)
            for j in tl.static_range(8):  # a page begun holds anything behind its last token
                if VALUE_OFFSET:
                    sum += w[j] * tl.where(token + j < high, offset[j], 0.0)[:, None]
                p = p + ((w[j] * tl.where(token + j < high, gain[j], 0.0)[:, None]).to(query.dtype.element_ty),)
            shift = tl.sum(sum, 0)[None, :]
            base = value_words + part * (DIM // PARTS) * (VALUE_WIDTH - 1)
            # A loop, its sums kept in `out`: unrolled, the code outgrows the instruction cache. A thread reads back what it wrote.
            for d in tl.range(part * (DIM // VTILE) // PARTS, (part + 1) * (DIM // VTILE) // PARTS, num_stages=VALUE_AHEAD, loop_unroll_factor=UNROLL):
                if VALUE_WIDTH <= 4:
                    word = nibbles(base + d * VTILE, half[None, :] * (DIM // PARTS) + full, full, turn[None, :], slot[None, :], DIM // PARTS, VALUE_WIDTH, ASM)
                    y = affine_triton.levels(word, value_levels, ASM) if VALUE_INTEGER else levels(word, value_levels, VALUE_WIDTH, ASM)
                else:
                    y = _gathered(base + d * VTILE, half[None, :], full, turn[None, :], slot[None, :], DIM // PARTS, value_books, VALUE_WIDTH, ASM)
                sums = out + d * VTILE
                held = tl.load(sums, mask=(start + chan * 0 > low)[:, None] & (group >= 0)[None, :], other=0)
                added = tl.zeros([VTILE, G], tl.float32) + shift
                for j in tl.static_range(8):
                    added = tl.dot(y[j].to(p[j].dtype), p[j], added, input_precision="ieee")
                tl.store(sums, held * decay[None, :] + added)
    tl.store(stat + place * 2 * G + group, top)
    tl.store(stat + (place * 2 + 1) * G + group, mass)
