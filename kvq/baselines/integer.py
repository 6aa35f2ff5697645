"""Plain integers per token and head: the least that a cache quantizer has to beat.

asymmetric: code = round((x - min) / scale), scale = (max - min) / (2^b - 1), float16 scale and minimum, b + 32/D bits
symmetric:  code = round(x / scale),         scale = max|x| / (2^(b-1) - 1),  float16 scale,             b + 16/D bits
"""

import torch
from torch import Tensor, nn

from kernels.bitpack import pack, packed_bytes, unpack
from kernels.paged import fuse
from kernels.pages import Segment, Spec
from kvq.baselines.affine import dequantize, extent, quantize
from kvq.baselines.inputs import accept, fitted, half, sizes


class Integer(nn.Module):
    """b-bit integers with one scale (and one minimum unless symmetric) per token and head."""

    block = 1
    grad_group = None
    depends_on = ()

    def __init__(self, bits: float, *, symmetric: bool, space: str, seed: int = 0):
        """Raises ValueError unless bits is a whole number from 2 to 8 and space "pre" or "post". The seed is unused."""
        super().__init__()
        if bits not in range(2, 9):
            raise ValueError(f"Integer bits must be a whole number from 2 to 8, got {bits}.")
        if space not in ("pre", "post"):
            raise ValueError(f"Integer space must be 'pre' or 'post', got {space!r}.")
        self.code_bits, self.symmetric, self.space = int(bits), symmetric, space
        self.register_buffer("shape", None)

    @property
    def bits(self) -> float:
        """Stored bits per value: the codes and the float16 side data of each token and head."""
        dim = fitted(self.shape)[1]
        return (8 * packed_bytes(dim, self.code_bits) + (16 if self.symmetric else 32)) / dim

    def fit(self, calibration) -> "Integer":
        """Take the shape from calibration.x [H, N, D]; nothing is learned."""
        self.shape = sizes(calibration.x)
        return self

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [B, H, T, D] to codes [B, H, T, bytes] uint8, scale [B, H, T] and, unless symmetric, minimum [B, H, T] float16.

        Raises ValueError on NaN, infinity, or side data beyond float16.
        """
        x = accept(x, self.shape)
        if not self.symmetric:
            minimum, scale = extent(x, self.code_bits, -1)
            codes = quantize(x, minimum, scale, self.code_bits)
            return {"codes": pack(codes, self.code_bits), "scale": scale.squeeze(-1), "minimum": minimum.squeeze(-1)}
        top = 2 ** (self.code_bits - 1) - 1
        scale = half(x.abs().amax(-1, keepdim=True) / top, "The scale of a token")
        codes = quantize(x, -top * scale.float(), scale, self.code_bits).clamp_max(2 * top)
        return {"codes": pack(codes, self.code_bits), "scale": scale.squeeze(-1)}

    def decode(self, codes: dict[str, Tensor]) -> Tensor:
        """Return [B, H, T, D] float32."""
        integers = unpack(codes["codes"], self.code_bits, fitted(self.shape)[1])
        scale = codes["scale"].float().unsqueeze(-1)
        if self.symmetric:
            return (integers - (2 ** (self.code_bits - 1) - 1)) * scale
        return dequantize(integers, codes["minimum"].unsqueeze(-1), scale)

    def paged(self) -> Spec:
        """The codec as kernels read it: levels are the integers, the gain is the scale, the offset the minimum."""
        heads, dim = fitted(self.shape)
        top = 2 ** (self.code_bits - 1) - 1 if self.symmetric else 0
        levels = torch.arange(2**self.code_bits, device=self.shape.device).float() - top
        segments = tuple(Segment(h, 0, dim, self.code_bits, 0) for h in range(heads))
        return Spec(heads, dim, segments, levels, None, None, self._symbols, self._restore, offset=not self.symmetric)

    def fuse(self, value: nn.Module):
        """Attention over packed codes with this value codec, or None where no kernel serves the pair."""
        return fuse(self, value)

    def _symbols(self, codes: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        sides = [codes["scale"]] if self.symmetric else [codes["scale"], codes["minimum"]]
        return unpack(codes["codes"], self.code_bits, fitted(self.shape)[1]), torch.cat(sides, 1)

    def _restore(self, symbols: Tensor, sides: Tensor) -> dict[str, Tensor]:
        names = ["scale"] if self.symmetric else ["scale", "minimum"]
        return {"codes": pack(symbols, self.code_bits), **dict(zip(names, sides.chunk(len(names), 1)))}
