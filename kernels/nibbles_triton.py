"""Triton: eight codes per 32-bit word, from the bit planes of `kernels.pages` to levels. Shared by all kernels that read pages.

Two words' nibbles are woven so that byte permutes look up neighbours together: 22 instructions give 16 levels from a table of eight, 46
from one of sixteen, without memory. Both words of a pair share the table, whatever pair Triton makes. ASM=False is the same in plain Triton.
"""

import triton
import triton.language as tl


@triton.jit
def nibbles(base, half, full, turn, slot, n, WIDTH: tl.constexpr):
    """Words of eight codes of WIDTH 1 to 4 bits. half, full: word offsets in the plane of bit pairs and of the odd bit; n: channels."""
    if WIDTH == 1:
        word = (tl.load(base + full) >> slot) & 0x11111111
    else:
        word = (tl.load(base + half) >> turn) & 0x33333333
        if WIDTH == 3:
            word += ((tl.load(base + full + 2 * n) >> slot) & 0x11111111) * 4
        if WIDTH == 4:
            word += ((tl.load(base + half + 2 * n) >> turn) & 0x33333333) * 4
    return word


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


@triton.jit
def table(at):
    """The eight table words at `at` as [1, 1] tensors: high bytes of levels 0..3, 4..7, 8..11, 12..15, then low bytes.

    Loaded and broadcast, not splatted: Triton moves the operand layout of a dot up to the packed words only past loads.
    """
    words = ()
    for i in tl.static_range(8):
        words = words + (tl.load(at + i + tl.zeros([1, 1], tl.int32)),)
    return words
