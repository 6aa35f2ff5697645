"""Muon with the layers' matrices of one shape orthogonalised together (K. Jordan et al., 2024: momentum, then Newton-Schulz towards U V^T)."""

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of each matrix of x [N, R, C], by the quintic Newton-Schulz iteration in bf16."""
    a, b, c = COEFFICIENTS
    wide = x.shape[-2] > x.shape[-1]
    y = (x.mT if wide else x).bfloat16()
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if wide else y).to(x.dtype)


class Muon(torch.optim.Optimizer):
    """Steps scaled to the size AdamW's would have (0.2 of the root mean square), so both share one learning rate."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        super().__init__([{"params": group} for group in shapes.values()], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            gradients = torch.stack([matrix.grad for matrix in group["params"]])
            state = self.state[group["params"][0]]
            average = state.setdefault("momentum", torch.zeros_like(gradients))
            average.lerp_(gradients, 1 - group["momentum"])
            update = orthogonal(gradients.lerp(average, group["momentum"]))
            size = 0.2 * max(gradients.shape[-2:]) ** 0.5
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(group["params"], list(update.unbind()), alpha=-group["lr"] * size)
