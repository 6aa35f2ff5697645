"""Uniform scalar quantization between a minimum and a maximum: code = round((x - min) / scale), scale = (max - min) / (2^b - 1)."""

import torch
from torch import Tensor

from kvq.baselines.inputs import half


def extent(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return (minimum, scale), float16, of x over `dim`, which is kept with size 1.

    Raises ValueError if either leaves the float16 range.
    """
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    return half(low, "The minimum of a group"), half((high - low) / (2**bits - 1), "The scale of a group")


def quantize(x: Tensor, minimum: Tensor, scale: Tensor, bits: int, floor: float = 1e-8) -> Tensor:
    """Return codes (int32, shape of x) in [0, 2**bits); values outside the extent are clamped.

    The stored (rounded) minimum and scale are used, so that decoding inverts exactly what was coded. `floor` keeps the
    division defined where a constant group has scale 0; such a group decodes to its minimum.
    """
    steps = (x - minimum.float()) / scale.float().clamp_min(floor)
    return steps.round().clamp(0, 2**bits - 1).to(torch.int32)


def dequantize(codes: Tensor, minimum: Tensor, scale: Tensor) -> Tensor:
    """Return minimum + scale * codes, float32."""
    return torch.addcmul(minimum.float(), codes.float(), scale.float())
