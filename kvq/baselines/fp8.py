"""FP8, the format that serving engines deploy: x / scale cast to E4M3 (3 mantissa bits, largest finite value 448)."""

import torch
from torch import Tensor, nn

from kernels.paged import fuse
from kernels.pages import Segment, Spec
from kvq.baselines.inputs import accept, finite, fitted, half, sizes

LARGEST = 448.0
# A scale below the smallest normal float16 would lose its own precision; above it E4M3 still reaches down to 2**-23.
SMALLEST_SCALE = 2.0**-14


class FP8(nn.Module):
    """E4M3 codes with one scale per tensor or one float16 scale per token and head.

    granularity "tensor": scale = max|x| / 448 of the calibration vectors, float32, frozen; later values beyond it
    saturate at +-448 * scale, as in serving engines. "token_head": scale = max|x| / 448 of each token's head vector,
    16 / D extra bits per value, never saturates.
    """

    block = 1
    grad_group = None

    def __init__(self, bits: float, *, granularity: str, space: str, seed: int = 0):
        """Raises ValueError unless bits is 8, granularity "tensor" or "token_head", space "pre" or "post"."""
        super().__init__()
        if bits != 8:
            raise ValueError(f"FP8 stores 8-bit codes, got bits={bits}; the only valid choice is 8.")
        if granularity not in ("tensor", "token_head"):
            raise ValueError(f"FP8 granularity must be 'tensor' or 'token_head', got {granularity!r}.")
        if space not in ("pre", "post"):
            raise ValueError(f"FP8 space must be 'pre' or 'post', got {space!r}.")
        self.granularity, self.space = granularity, space
        self.depends_on = ("calib",) if granularity == "tensor" else ()
        self.register_buffer("shape", None)
        self.register_buffer("scale", None)

    @property
    def bits(self) -> float:
        """8 stored bits per value, plus 16 / D with one scale per token and head."""
        return 8.0 if self.granularity == "tensor" else 8 + 16 / fitted(self.shape)[1]

    def fit(self, calibration) -> "FP8":
        """Take the shape and, for "tensor", the scale from calibration.x [H, N, D]. Raises ValueError on NaN or infinity."""
        self.shape = sizes(calibration.x)
        if self.granularity == "tensor":
            amax = finite(calibration.x).abs().amax()
            # All-zero calibration vectors say nothing about the range: fall back to the cast without a scale.
            self.scale = torch.where(amax > 0, (amax / LARGEST).clamp_min(torch.finfo(torch.float32).tiny), 1.0)
        return self

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [B, H, T, D] to codes [B, H, T, D] uint8 (the bytes of float8_e4m3fn) and, per token and head, scale [B, H, T].

        Raises ValueError on NaN, infinity, or a scale beyond float16.
        """
        x = accept(x, self.shape)
        if self.granularity == "tensor":
            return {"codes": _cast(x / self.scale)}
        scale = half((x.abs().amax(-1) / LARGEST).clamp_min(SMALLEST_SCALE), "The scale of a token")
        return {"codes": _cast(x / scale.float().unsqueeze(-1)), "scale": scale}

    def decode(self, codes: dict[str, Tensor]) -> Tensor:
        """Return [B, H, T, D] float32."""
        x = codes["codes"].view(torch.float8_e4m3fn).float()
        return x * (self.scale if self.granularity == "tensor" else codes["scale"].float().unsqueeze(-1))

    def paged(self) -> Spec:
        """The codec as kernels read it: 256 levels, times the frozen scale or with a gain per token; codes that are no number mean 0."""
        heads, dim = fitted(self.shape)
        frozen = self.granularity == "tensor"
        levels = torch.arange(256, dtype=torch.uint8, device=self.shape.device).view(torch.float8_e4m3fn).float().nan_to_num(0.0)
        segments = tuple(Segment(h, 0, dim, 8, 0) for h in range(heads))
        return Spec(heads, dim, segments, levels * self.scale if frozen else levels, None, None, self._symbols, self._restore, bare=frozen)

    def fuse(self, value: nn.Module):
        """Attention over packed codes with this value codec, or None where no kernel serves the pair."""
        return fuse(self, value)

    def _symbols(self, codes: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        bare = codes["codes"].new_empty(codes["codes"].shape[0], 0, codes["codes"].shape[2], dtype=torch.float16)
        return codes["codes"].int(), codes.get("scale", bare)

    def _restore(self, symbols: Tensor, sides: Tensor) -> dict[str, Tensor]:
        codes = {"codes": symbols.to(torch.uint8)}
        return codes if self.granularity == "tensor" else {**codes, "scale": sides}


def _cast(x: Tensor) -> Tensor:
    # Bytes, not float8 tensors: indexing and concatenation of float8 are not implemented on every device.
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
