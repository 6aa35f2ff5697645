"""Triton: eight codes per 32-bit word, from the bit planes of `kernels.pages` to levels. Shared by all kernels that read pages.

Two words' nibbles are woven so that byte permutes look up neighbours together: 22 instructions give 16 levels from a table of eight, 46
from one of sixteen, without memory. Both words of a pair share the table, whatever pair Triton makes. ASM=False is the same in plain Triton.
"""

import triton
import triton.language as tl


@triton.jit
def _raised(word, shift, ASM: tl.constexpr):
    """word >> shift with its lowest bit at bit 2, in one rotation; other bits are anything. shift: 0 to 3."""
    if ASM:
        return tl.inline_asm_elementwise("shf.r.wrap.b32 $0, $1, $1, $2;", "=r,r,r", [word, shift + 30], dtype=tl.int32, is_pure=True, pack=1)
    return (word >> shift) * 4


@triton.jit
def nibbles(base, half, full, turn, slot, n, WIDTH: tl.constexpr, ASM: tl.constexpr):
    """Words of eight codes of WIDTH 1 to 4 bits. half, full: word offsets in the plane of bit pairs and of the odd bit; n: channels."""
    if WIDTH == 1:
        word = (tl.load(base + full) >> slot) & 0x11111111
    else:
        word = (tl.load(base + half) >> turn) & 0x33333333
        if WIDTH == 3:
            word += _raised(tl.load(base + full + 2 * n), slot, ASM) & 0x44444444
        if WIDTH == 4:
            word += _raised(tl.load(base + half + 2 * n), turn, ASM) & (-0x33333334)
    return word


@triton.jit
def high_nibbles(base, half, full, turn, slot, n, WIDTH: tl.constexpr):
    """Bits 4 and 5 of the codes whose low four :func:`nibbles` gives."""
    if WIDTH == 5:
        return (tl.load(base + full + 4 * n) >> slot) & 0x11111111
    return (tl.load(base + half + 4 * n) >> turn) & 0x33333333


@triton.jit
def _byte(low, high, code):
    return (tl.where(code >= 4, high, low) >> ((code & 3) * 8)) & 255


@triton.jit
def _plain(word, h0, h1, h2, h3, l0, l1, l2, l3, J: tl.constexpr, WIDE: tl.constexpr):
    code = (word >> (4 * J)) & 15
    level = _byte(h0, h1, code & 7) * 256 + _byte(l0, l1, code & 7)
    if WIDE:
        level = tl.where(code >= 8, _byte(h2, h3, code & 7) * 256 + _byte(l2, l3, code & 7), level)
    return level.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def levels(word, words, WIDTH: tl.constexpr, ASM: tl.constexpr):
    """The eight float16 levels of a word's nibbles. words: see :func:`table`."""
    h0, h1, h2, h3, l0, l1, l2, l3 = words
    h0, h1, h2, h3 = tl.broadcast_to(h0, word.shape), tl.broadcast_to(h1, word.shape), tl.broadcast_to(h2, word.shape), tl.broadcast_to(h3, word.shape)
    l0, l1, l2, l3 = tl.broadcast_to(l0, word.shape), tl.broadcast_to(l1, word.shape), tl.broadcast_to(l2, word.shape), tl.broadcast_to(l3, word.shape)
    if not ASM:
        y = ()
        for j in tl.static_range(8):
            y = y + (_plain(word, h0, h1, h2, h3, l0, l1, l2, l3, j, WIDTH == 4),)
        return y
    if WIDTH == 4:  # the fourth bit picks a byte of one of two lookups
        y = tl.inline_asm_elementwise(
            """{
            .reg .b32 n, s, t, u, a, b, c;
            shl.b32 s, $9, 4; lop3.b32 t, $8, s, 0x0F0F0F0F, 0xE4;
            shr.u32 s, $8, 4; lop3.b32 u, s, $9, 0x0F0F0F0F, 0xE4;
            and.b32 n, t, 0x77777777; shr.u32 s, t, 1; lop3.b32 s, s, 0x44444444, 0x32103210, 0xEA;
            prmt.b32 a, $10, $12, n; prmt.b32 b, $14, $16, n; prmt.b32 a, a, b, s; prmt.b32 b, $18, $20, n; prmt.b32 c, $22, $24, n; prmt.b32 b, b, c, s;
            prmt.b32 $0, b, a, 0x5140; prmt.b32 $2, b, a, 0x7362; shr.u32 n, n, 16; shr.u32 s, s, 16;
            prmt.b32 a, $10, $12, n; prmt.b32 b, $14, $16, n; prmt.b32 a, a, b, s; prmt.b32 b, $18, $20, n; prmt.b32 c, $22, $24, n; prmt.b32 b, b, c, s;
            prmt.b32 $4, b, a, 0x5140; prmt.b32 $6, b, a, 0x7362;
            and.b32 n, u, 0x77777777; shr.u32 s, u, 1; lop3.b32 s, s, 0x44444444, 0x32103210, 0xEA;
            prmt.b32 a, $10, $12, n; prmt.b32 b, $14, $16, n; prmt.b32 a, a, b, s; prmt.b32 b, $18, $20, n; prmt.b32 c, $22, $24, n; prmt.b32 b, b, c, s;
            prmt.b32 $1, b, a, 0x5140; prmt.b32 $3, b, a, 0x7362; shr.u32 n, n, 16; shr.u32 s, s, 16;
            prmt.b32 a, $10, $12, n; prmt.b32 b, $14, $16, n; prmt.b32 a, a, b, s; prmt.b32 b, $18, $20, n; prmt.b32 c, $22, $24, n; prmt.b32 b, b, c, s;
            prmt.b32 $5, b, a, 0x5140; prmt.b32 $7, b, a, 0x7362;
            }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [word, h0, h1, h2, h3, l0, l1, l2, l3],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        y = tl.inline_asm_elementwise(
            """{
            .reg .b32 s, t, u, a, b;
            shl.b32 s, $9, 4; lop3.b32 t, $8, s, 0x0F0F0F0F, 0xE4;
            shr.u32 s, $8, 4; lop3.b32 u, s, $9, 0x0F0F0F0F, 0xE4;
            prmt.b32 a, $10, $12, t; prmt.b32 b, $14, $16, t; prmt.b32 $0, b, a, 0x5140; prmt.b32 $2, b, a, 0x7362;
            prmt.b32 a, $10, $12, u; prmt.b32 b, $14, $16, u; prmt.b32 $1, b, a, 0x5140; prmt.b32 $3, b, a, 0x7362;
            shr.u32 t, t, 16; shr.u32 u, u, 16;
            prmt.b32 a, $10, $12, t; prmt.b32 b, $14, $16, t; prmt.b32 $4, b, a, 0x5140; prmt.b32 $6, b, a, 0x7362;
            prmt.b32 a, $10, $12, u; prmt.b32 b, $14, $16, u; prmt.b32 $5, b, a, 0x5140; prmt.b32 $7, b, a, 0x7362;
            }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r", [word, h0, h1, l0, l1],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
        )  # fmt: skip
    half = ()
    for j in tl.static_range(8):
        half = half + (y[j].to(tl.float16, bitcast=True),)
    return half


def _shuffles(width: int) -> str:
    """Assembly: codes of two words in bytes, each byte a shuffle; with 6 bits the sixth picks one of the two levels that come back."""
    lines = [".reg .b32 s, t, e, f, o, p, a, b;"]
    for low, high, even, odd in (("$8", "$10", "e", "o"), ("$9", "$11", "f", "p")):
        lines.append(f"shl.b32 s, {high}, 4; lop3.b32 {even}, {low}, s, 0x0F0F0F0F, 0xE4; shr.u32 s, {low}, 4; lop3.b32 {odd}, s, {high}, 0x0F0F0F0F, 0xE4;")
    for j in range(8):
        words, byte = ("op" if j % 2 else "ef"), j // 2
        lines += [f"shr.u32 s, {word}, {8 * byte}; shfl.sync.idx.b32 {to}, $12, s, 31, -1;" for word, to in zip(words, "ab")]
        pick = "mov.b32 s, 0x5410;"
        if width == 6:
            pick = f"prmt.b32 s, {words[0]}, {words[1]}, {0x40 + 0x11 * byte}; and.b32 s, s, 0x2020; shr.u32 t, s, 4; lop3.b32 s, s, t, 0x5410, 0xFE;"
        lines.append(f"{pick} prmt.b32 ${j}, a, b, s;")
    return "{ " + "\n".join(lines) + " }"


FIVE, SIX = tl.constexpr(_shuffles(5)), tl.constexpr(_shuffles(6))


@triton.jit
def wide_levels(low, high, held, books, WIDTH: tl.constexpr, ASM: tl.constexpr):
    """The eight float16 levels of codes of 5 or 6 bits: the low four in the nibbles of `low`, the rest in those of `high`. held: see :func:`lanes`."""
    if not ASM:
        y = ()
        for j in tl.static_range(8):
            y = y + (tl.load(books + (((low >> (4 * j)) & 15) | (((high >> (4 * j)) & 15) << 4))),)
        return y
    held = tl.broadcast_to(held, low.shape)
    y = tl.inline_asm_elementwise(
        FIVE if WIDTH == 5 else SIX, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r", [low, high, held],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
    )  # fmt: skip
    half = ()
    for j in tl.static_range(8):
        half = half + (y[j].to(tl.float16, bitcast=True),)
    return half


@triton.jit
def lane(ASM: tl.constexpr):
    """A thread's number in its warp, int32 [1, 1]; 0 without assembly. Triton takes an element of [1, 1] to be the same in all threads; nothing makes it so."""
    at = tl.zeros([1, 1], tl.int32)
    if ASM:
        at = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [at], dtype=tl.int32, is_pure=True, pack=1)
    return at


@triton.jit
def lanes(books, WIDTH: tl.constexpr, ASM: tl.constexpr):
    """A table of 32 or 64 levels spread over a warp, int32 [1, 1]: every lane holds its own level, and with 6 bits the one 32 behind it as high half.

    A shuffle then reads any of them without memory.
    """
    at = lane(ASM)
    held = tl.load(books + at).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    if WIDTH == 6:
        held += tl.load(books + 32 + at).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return held


@triton.jit
def table(at, zero):
    """The eight table words at `at` as [1, 1] tensors: high bytes of levels 0..3, 4..7, 8..11, 12..15, then low bytes.

    Loaded and broadcast, not splatted: Triton moves the operand layout of a dot up to the packed words only past loads.
    zero: int32 [1, 1], 0 in a way that the compiler cannot know. Else it holds the words in uniform registers and copies them before every use.
    """
    words = ()
    for i in tl.static_range(8):
        words = words + (tl.load(at + i + zero),)
    return words
