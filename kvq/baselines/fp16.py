"""The 16-bit reference: keys and values kept as the model made them."""

import torch
from torch import Tensor, nn

from kvq.baselines.inputs import accept, half, sizes


class FP16(nn.Module):
    """Holds 16-bit tensors. float16 and bfloat16 are stored as they are, float32 as float16."""

    block = 1
    space = "post"
    grad_group = None
    depends_on = ()

    def __init__(self, bits: float, *, seed: int = 0):
        """Raises ValueError unless bits is 16. The seed is accepted and unused."""
        super().__init__()
        if bits != 16:
            raise ValueError(f"FP16 stores 16 bits, got bits={bits}; the only valid choice is 16.")
        self.register_buffer("shape", None)

    @property
    def bits(self) -> float:
        """16 stored bits per value."""
        return 16.0

    def fit(self, calibration) -> "FP16":
        """Take the shape from calibration.x [H, N, D]; nothing is learned."""
        self.shape = sizes(calibration.x)
        return self

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [B, H, T, D] to one 16-bit leaf of the same shape.

        Raises ValueError on NaN, infinity, or a float32 value beyond the float16 range: clamping it would be silent.
        """
        exact = accept(x, self.shape)
        if x.dtype in (torch.float16, torch.bfloat16):
            return {"x": x.clone()}
        return {"x": half(exact, "A value")}

    def decode(self, codes: dict[str, Tensor]) -> Tensor:
        """Return [B, H, T, D] float32."""
        return codes["x"].float()
