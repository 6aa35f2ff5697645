"""Triton: eight codes per 32-bit word to levels that are consecutive integers, in place of the lookups of `kernels.nibbles_triton`.

The bits of a code below 0x6400 are the float16 number 1024 + code, and four bits further up 1024 + 16 code: one logical operation makes
two levels from two words, one addition or multiplication of halves puts them in their place, exactly. 12 operations on integers and 8 on
halves give 16 levels, of any width up to four bits, where `kernels.scalar.consecutive` says so. ASM=False is the same in plain Triton.
"""

import triton
import triton.language as tl


@triton.jit
def _twice(x):
    """The float16 x in both halves of an int32."""
    return (x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001


@triton.jit
def table(at, zero):
    """What :func:`levels` needs of the table `kernels.nibbles_triton.table` reads at the same place: what takes 1024, or 64, to the first level."""
    first = (((tl.load(at + zero) & 255) << 8) | (tl.load(at + 4 + zero) & 255)).to(tl.int16).to(tl.float16, bitcast=True)
    return _twice((first.to(tl.float32) - 1024.0).to(tl.float16)), _twice((first.to(tl.float32) - 64.0).to(tl.float16))


@triton.jit
def levels(word, words, ASM: tl.constexpr):
    """The eight float16 levels of a word's nibbles. words: see :func:`table`."""
    even, odd = words
    if not ASM:
        y = ()
        start = ((even & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) + 1024.0).to(tl.int32)
        for j in tl.static_range(8):
            y = y + ((((word >> (4 * j)) & 15) + start).to(tl.float16),)
        return y
    even, odd = tl.broadcast_to(even, word.shape), tl.broadcast_to(odd, word.shape)
    x = tl.inline_asm_elementwise(
        """{
        .reg .b32 t, u, a, k, s;
        mov.b32 k, 0x64006400; mov.b32 s, 0x2C002C00;
        prmt.b32 t, $8, $9, 0x5410; prmt.b32 u, $8, $9, 0x7632;
        lop3.b32 a, t, 0x000F000F, k, 0xEA; add.rn.f16x2 $0, a, $10;
        lop3.b32 a, t, 0x00F000F0, k, 0xEA; fma.rn.f16x2 $1, a, s, $12;
        lop3.b32 a, u, 0x000F000F, k, 0xEA; add.rn.f16x2 $4, a, $10;
        lop3.b32 a, u, 0x00F000F0, k, 0xEA; fma.rn.f16x2 $5, a, s, $12;
        shr.u32 t, t, 8; shr.u32 u, u, 8;
        lop3.b32 a, t, 0x000F000F, k, 0xEA; add.rn.f16x2 $2, a, $10;
        lop3.b32 a, t, 0x00F000F0, k, 0xEA; fma.rn.f16x2 $3, a, s, $12;
        lop3.b32 a, u, 0x000F000F, k, 0xEA; add.rn.f16x2 $6, a, $10;
        lop3.b32 a, u, 0x00F000F0, k, 0xEA; fma.rn.f16x2 $7, a, s, $12;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r", [word, even, odd],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
    )  # fmt: skip
    half = ()
    for j in tl.static_range(8):
        half = half + (x[j].to(tl.float16, bitcast=True),)
    return half
