"""Log-smoothed gradient weights (arXiv 2607.01065, section on gradient weighting): w = log(1 + lambda ||grad||), lambda = tau / (median + eps)."""

import torch
from torch import Tensor

KINDS = ("log", "raw", "none")
EPS = 1e-30  # only against a median of exactly zero; gradients of a mean loss are small themselves


def gradient_norms(grads: Tensor, pieces: int) -> Tensor:
    """Norms [M, N] of the loss gradient per piece, from squared gradients [N, C] summed over equal groups of channels.

    M = `pieces` must divide C, else ValueError; the groups are in channel order, so piece m owns groups m*C/M to (m+1)*C/M.
    """
    if grads.shape[-1] % pieces:
        raise ValueError(f"{grads.shape[-1]} gradient groups do not divide into {pieces} pieces.")
    return grads.float().unflatten(-1, (pieces, -1)).sum(-1).sqrt().T.contiguous()


def log_weights(norms: Tensor, tau: float = 1.0) -> Tensor:
    """Weights log(1 + tau ||grad|| / median) [M, N] for gradient norms [M, N]; the median is taken over each row.

    The median vector gets log(1 + tau), whatever the scale of the loss. If more than half of a row is zero, the median is
    taken over its positive norms; a row of zeros gets weight one everywhere, because it says nothing about its vectors.
    """
    positive = norms.masked_fill(norms <= 0, torch.nan)
    median = norms.median(-1, keepdim=True).values
    median = torch.where(median > 0, median, positive.nanmedian(-1, keepdim=True).values)
    weights = torch.log1p(norms * (tau / (median + EPS)))
    return torch.where(median > 0, weights, torch.ones_like(weights))


def raw_weights(norms: Tensor) -> Tensor:
    """Weights ||grad|| [M, N] divided by their mean per row (a constant factor changes nothing); a row of zeros gets ones."""
    centre = norms.mean(-1, keepdim=True)
    return torch.where(centre > 0, norms / centre.clamp_min(EPS), torch.ones_like(norms))


def weigh(grads: Tensor | None, pieces: int, kind: str, tau: float = 1.0) -> Tensor | None:
    """Weights [M, N] of `kind` log or raw from grouped squared gradients [N, C]; None for kind none.

    Raises ValueError if gradients are needed and missing or not finite.
    """
    if kind == "none":
        return None
    if grads is None:
        raise ValueError(f"weights={kind!r} needs the loss gradients of the calibration; they are missing. Use weights='none' without them.")
    norms = gradient_norms(grads, pieces)
    if not bool(torch.isfinite(norms).all()):
        raise ValueError("The calibration gradients are not finite.")
    return log_weights(norms, tau) if kind == "log" else raw_weights(norms)
