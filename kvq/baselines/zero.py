"""The canary: forgets every key and value, so a task whose score it leaves alone does not read the cache."""

import torch
from torch import Tensor, nn

from kvq.baselines.inputs import accept, fitted, sizes


class Zero(nn.Module):
    """Keeps one byte per token, which says that the token exists, and decodes to zeros."""

    block = 1
    space = "post"
    grad_group = None
    depends_on = ()

    def __init__(self, bits: float, *, seed: int = 0):
        """Raises ValueError unless bits is 0. The seed is accepted and unused."""
        super().__init__()
        if bits != 0:
            raise ValueError(f"Zero keeps nothing, got bits={bits}; the only valid choice is 0.")
        self.register_buffer("shape", None)

    @property
    def bits(self) -> float:
        """Stored bits per value: 8 / (H * D), the one byte per token."""
        heads, dim = fitted(self.shape)
        return 8 / (heads * dim)

    def fit(self, calibration) -> "Zero":
        """Take the shape from calibration.x [H, N, D]; nothing is learned."""
        self.shape = sizes(calibration.x)
        return self

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """x [B, H, T, D] to one leaf [B, 1, T, 1] uint8 of zeros. Raises ValueError on NaN or infinity."""
        accept(x, self.shape)
        return {"token": torch.zeros(x.shape[0], 1, x.shape[2], 1, dtype=torch.uint8, device=x.device)}

    def decode(self, codes: dict[str, Tensor]) -> Tensor:
        """Return zeros [B, H, T, D] float32."""
        heads, dim = fitted(self.shape)
        token = codes["token"]
        return torch.zeros(token.shape[0], heads, token.shape[2], dim, device=token.device)
