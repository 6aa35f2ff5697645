"""Codes of a token as bytes of words, and rows of tables by such words, in layouts that `kernels.lookup_direct_triton` chooses."""

import triton
import triton.language as tl


@triton.jit
def _joined(low, high, offset):
    # Bytes from number offset % 4 of `low` on, continued in `high`
    shift = (offset & 3) * 8
    return ((low.to(tl.uint32, bitcast=True) >> shift) | (high.to(tl.uint32, bitcast=True) << (31 - shift) << 1)).to(tl.int32, bitcast=True)


@triton.jit
def words(codes, offset, token, stride_code, stride_token, DEPTH: tl.constexpr, WORDS: tl.constexpr):
    """Codes of DEPTH stages from byte `offset` of a token on, in the bytes of an int32 of the shape of offset + token.

    WORDS: 0 reads codes one by one; rows of codes being aligned, 4 reads one word, which must hold them all, 8 reads two, 16 reads a word of the
    lane's own, from which :func:`picked` takes the codes.
    """
    if WORDS > 0:
        place = codes + token * stride_token
        low = tl.load((place + (offset & -4)).to(tl.pointer_type(tl.int32), bitcast=True))
        if WORDS == 4 or WORDS == 16:
            return low
        high = tl.load((place + (offset + (DEPTH - 1) & -4)).to(tl.pointer_type(tl.int32), bitcast=True))
        return _joined(low, high, offset)
    place = codes + offset * stride_code + token * stride_token
    word = tl.load(place).to(tl.int32)
    for stage in tl.static_range(1, DEPTH):
        word |= tl.load(place + stage * stride_code).to(tl.int32) << (8 * stage)
    return word


@triton.jit
def picked(own, offset, DEPTH: tl.constexpr):
    """As :func:`words`, from all words of a token, held one each by the lanes of the first axis: one request instead of one for each piece."""
    low = tl.gather(own, tl.broadcast_to(offset >> 2, own.shape), 0)
    if DEPTH == 4:
        return low
    return _joined(low, tl.gather(own, tl.broadcast_to(offset + (DEPTH - 1) >> 2, own.shape), 0), offset)


@triton.jit
def gathered(word, inside, V: tl.constexpr, DEPTH: tl.constexpr, K: tl.constexpr, PIECE: tl.constexpr, KIND: tl.constexpr):
    """[..., V] of KIND: the sum of one row's chunk for each stage, `inside` [..., V] pointing into the first row of the first.

    word [4, 8, n, m], four stages at most. A loop that stays a loop is summed before it is put into the product's order.
    """
    SPARED: tl.constexpr = 1 if DEPTH > 2 else 0
    total = tl.load(inside + ((word & 255) * PIECE)[:, :, :, :, None]).to(KIND) if SPARED else tl.zeros([word.shape[0], word.shape[1], word.shape[2], word.shape[3], V], KIND)
    for stage in tl.range(SPARED, DEPTH, num_stages=1):
        code = (word >> (8 * stage)) & 255
        total += tl.load(inside + ((stage * K + code) * PIECE)[:, :, :, :, None]).to(KIND)
    return total
