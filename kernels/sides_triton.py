"""Triton: gains and offsets per token and segment, from the rows of sides of `kernels.pages` to float32."""

import triton
import triton.language as tl


@triton.jit
def packed(at, BARE: tl.constexpr = False):
    """The gains or offsets of a row's eight tokens, as they are held, in words of 64 bits. BARE: gains are 1 and not held."""
    words = ()
    if not BARE:
        for i in tl.static_range(at.dtype.element_ty.primitive_bitwidth // 8):
            words = words + (tl.load(at.to(tl.pointer_type(tl.int64)) + i),)
    return words


@triton.jit
def unpacked(words, token, SIZE: tl.constexpr, LOG8: tl.constexpr, BARE: tl.constexpr = False):
    """The eight gains or offsets of SIZE bits in float32; behind the last token they are anything. token: any tensor of their shape."""
    x = ()
    for j in tl.static_range(8):
        if BARE:
            x = x + (tl.full(token.shape, 1.0, tl.float32),)
        else:
            bits = words[j * SIZE // 64] >> (j * SIZE % 64)
            if LOG8:
                stored = (bits & 255).to(tl.int32)
                x = x + (tl.where(stored == 0, 0.0, tl.exp2((stored.to(tl.float32) - 128.0) * 0.125)),)
            elif SIZE == 16:
                x = x + (bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),)
            else:
                x = x + (bits.to(tl.int32).to(tl.float32, bitcast=True),)
    return x


@triton.jit
def sides(at, LOG8: tl.constexpr, BARE: tl.constexpr = False):
    """The eight gains or offsets at `at`, read and in float32."""
    return unpacked(packed(at, BARE), at, at.dtype.element_ty.primitive_bitwidth, LOG8, BARE)
