"""A pair of codecs whose codes `kernels.lookup` reads, as the cache calls it (`kvq.quantizer.Fused`)."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.lookup import Coded, attend

Read = Callable[[dict[str, Tensor]], Coded]
"""What a codec's stored codes are to the kernel; D-channel heads of T tokens."""


def serves(dim: int, *pieces: int) -> bool:
    """Whether heads of `dim` channels in such pieces have a kernel: a power of two from 16 on, pieces dividing half of it or multiples of it."""
    return dim >= 16 and not dim & (dim - 1) and all((dim // 2) % piece == 0 or piece % dim == 0 for piece in pieces)


def split_half(pairs: Tensor, dim: int) -> bool:
    """Whether RoPE turns channel i with i + dim / 2, every channel, as the kernel does."""
    return torch.equal(pairs.cpu(), torch.arange(dim).view(2, -1).T)


class Pair:
    """Keys and values of one layer. `space` of the keys; `units`: what sums of rows are multiplied by; inv_freq [D/2], or None until `turn`.

    append: as `kvq.quantizer.Fused.append`, or None where new tokens go through the codecs.
    """

    def __init__(
        self, key: Read, value: Read, dim: int, space: str, units: tuple[float, float] = (1.0, 1.0), inv_freq: Tensor | None = None, append: Callable | None = None
    ):
        self.reads, self.dim, self.space, self.units, self.inv_freq, self.append = (key, value), dim, space, units, inv_freq, append

    @property
    def unturned(self) -> bool:
        """Whether `turn` must be called before `attend`."""
        return self.space == "pre" and self.inv_freq is None

    def turn(self, pairs: Tensor, inv_freq: Tensor) -> bool:
        """Take the layer's rotation, pairs [D/2, 2] of channels and radians per token; False if the kernel does not do it."""
        if split_half(pairs, self.dim):
            self.inv_freq = inv_freq.float()
        return not self.unturned

    def held(self, index: int) -> None:
        """Codes are read as the codec packs them."""

    def attend(self, query: Tensor, key, value, tokens: int, *, scale: float, first: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `kvq.quantizer.Fused.attend`. Visible tokens stand at consecutive positions, so the last position fixes all."""
        if self.inv_freq is not None and self.inv_freq.device != query.device:
            self.inv_freq = self.inv_freq.to(query.device)
        coded = [read(held.codes) for held, read in zip((key, value), self.reads, strict=True)]
        base = (positions[:, tokens - 1] - (tokens - 1)).to(torch.int32) if self.space == "pre" else None
        output, lse = attend(query, *coded, tokens, scale * self.units[0], self.inv_freq if self.space == "pre" else None, base, first)
        return output * self.units[1], lse
