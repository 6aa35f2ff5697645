"""Attention of one query over the packed codes of a GSRQ layer, through `kernels.lookup`."""

from kernels import append
from kernels.lookup import Coded
from kernels.lookup_pair import Pair, serves


def fuse(key, value) -> Pair | None:
    """What attends over keys coded by `key` and values coded by `value` (fitted :class:`gsrq.GSRQ`), or None where no kernel does.

    Served are codes of 8 bits, shapes that `kernels.lookup_pair.serves` and, for keys before RoPE, the split-half rotation of whole heads.
    """
    if type(value) is not type(key) or key.code_bits != 8 or value.code_bits != 8 or int(key.heads) != int(value.heads):
        return None
    dim = key.head_dim
    if dim != value.head_dim or not serves(dim, key.codebooks.shape[3], value.codebooks.shape[3]) or (key.space == "pre" and key.inv_freq is None):
        return None
    reads = [lambda codes, codec=codec: Coded(codes["codes"].mT, codec.codebooks) for codec in (key, value)]
    units = float(key.scale), float(value.scale)

    def write(held, tokens, at, turn) -> None:
        books = [append.Book(codec.codebooks, unit) for codec, unit in zip((key, value), units)]
        append.append([leaves["codes"] for leaves in held], tokens, books, at, turn)

    return Pair(*reads, dim, key.space, units, key.inv_freq, write if key.beam == value.beam == 1 else None)
