"""Attention of one query over the packed codes of a GSRQ layer, through `kernels.lookup`."""

import torch
from torch import Tensor

from kernels.lookup import Coded, attend


def fuse(key, value) -> "FusedPair | None":
    """What attends over keys coded by `key` and values coded by `value` (fitted :class:`gsrq.GSRQ`), or None where no kernel does.

    Served are codes of 8 bits, heads of a power of two from 16 on, pieces that divide half a head or are a multiple of one, and, for keys
    before RoPE, the split-half rotation of whole heads.
    """
    if type(value) is not type(key) or key.code_bits != 8 or value.code_bits != 8 or int(key.heads) != int(value.heads):
        return None
    dim = key.head_dim
    pieces = (key.codebooks.shape[3], value.codebooks.shape[3])
    whole = all((dim // 2) % piece == 0 or piece % dim == 0 for piece in pieces)
    if dim != value.head_dim or dim < 16 or dim & (dim - 1) or not whole or (key.space == "pre" and key.inv_freq is None):
        return None
    return FusedPair(key, value)


class FusedPair:
    """One layer's pair of codecs behind `kvq.quantizer.Fused`."""

    def __init__(self, key, value):
        self.tables = (key.codebooks, value.codebooks)
        self.units = (float(key.scale), float(value.scale))  # tables are stored in these units
        self.inv_freq = key.inv_freq if key.space == "pre" else None

    def held(self, index: int) -> None:
        """Codes are read as the codec packs them."""

    def attend(self, query: Tensor, key, value, tokens: int, *, scale: float, first: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `kvq.quantizer.Fused.attend`. Visible tokens stand at consecutive positions, so the last position fixes all."""
        coded = [Coded(held.codes["codes"].mT, tables) for held, tables in zip((key, value), self.tables, strict=True)]
        base = None if self.inv_freq is None else (positions[:, tokens - 1] - (tokens - 1)).to(torch.int32)
        output, lse = attend(query, *coded, tokens, scale * self.units[0], self.inv_freq, base, first)
        return output * self.units[1], lse
