"""The one scalar stored per coded vector: how it is chosen, and how it is held in 8, 16 or 32 bits.

The public code keeps it in fp32 for quality and fp16 for serving and counts it in neither; here it is stored and counted.
"""

import torch
from torch import Tensor

GAINS = ("unit_norm", "least_squares")
NORM_BYTES = {"float16": 2, "float32": 4, "log8": 1}
STORED = {"float16": torch.float16, "float32": torch.float32, "log8": torch.uint8}
_STEPS, _OFFSET = 8, 128  # log8: 2**((code - 128) / 8), i.e. 2**-15.9 to 2**15.9 in steps of 9 %; code 0 is zero


def prepare(x: Tensor, mean: Tensor | None) -> Tensor:
    """x [B, H, T, D] in float64 (float32 on devices without it) less mean [H, D]; raises ValueError where x is not finite.

    float64 because the sums of a matrix product depend on the number of rows: in float32 a vector near a threshold could take
    another code when it is encoded alone, in float64 that is out of reach.
    """
    finite = torch.isfinite(x)
    if not finite.all():
        where = (~finite).nonzero()[0].tolist()
        raise ValueError(f"Cannot encode: value {x[tuple(where)].item()} at [batch, head, token, channel] = {where}.")
    x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
    return x if mean is None else x - mean[:, None]


def channel_mean(x: Tensor) -> Tensor:
    """Mean over tokens of calibration vectors [H, N, D], as [H, D] float32; raises ValueError if it is not finite."""
    mean = torch.stack([head.double().mean(0) for head in x]).float()
    if not torch.isfinite(mean).all():
        raise ValueError("The calibration vectors contain values that are not finite.")
    return mean


def solve_gain(norm: Tensor, inner: Tensor, power: Tensor, gain: str) -> Tensor:
    """Gain from |x|, <x R^T, y> and |y|^2 of the unit-variance code vector y: |x| / |y|, or the least-squares factor."""
    return norm / power.sqrt() if gain == "unit_norm" else inner / power


def store_norm(gain: Tensor, norm_dtype: str) -> Tensor:
    """Gain >= 0 rounded to the stored type; raises ValueError when it is beyond the largest stored value, never stores inf.

    Gains below the smallest stored value become zero.
    """
    limit = 2.0 ** ((255 - _OFFSET) / _STEPS) if norm_dtype == "log8" else torch.finfo(getattr(torch, norm_dtype)).max
    if gain.numel() and gain.max() > limit:
        raise ValueError(
            f"Cannot encode: gain {gain.max().item():.4g} of a vector exceeds the largest {norm_dtype} value {limit:.4g}; "
            "set norm_dtype=float32 or center=true."
        )
    if norm_dtype != "log8":
        return gain.to(getattr(torch, norm_dtype))
    code = (_STEPS * gain.clamp_min(2.0**-30).log2()).round() + _OFFSET
    return code.clamp(0, 255).to(torch.uint8)


def load_norm(stored: Tensor, norm_dtype: str) -> Tensor:
    """Stored gains back in float32, in the shape of `stored`."""
    if norm_dtype != "log8":
        return stored.float()
    return torch.where(stored == 0, 0.0, torch.exp2((stored.float() - _OFFSET) / _STEPS))
