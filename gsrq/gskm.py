"""Gain-shape k-means, GSKM (arXiv 2607.01065, Algorithm 1), with per-vector weights.

Entry k is g_k s_k with ||s_k|| = 1; assignment is the nearest entry in L2, argmax_k 2 g_k x.s_k - g_k^2; then
    s_k = normalise(sum_i w_i x_i / ||x_i||)           blind to the norms of the members
    g_k = max(0, sum_i w_i x_i.s_k / sum_i w_i)        least-squares gain for that direction
The direction step may raise the error, so the objective is not monotone and the best iterate is kept.
"""

import torch
from torch import Tensor

from kernels.kmeans import EPS, Clustering, cluster, sums


def gain_shape(x: Tensor, weights: Tensor, inverse: Tensor, labels: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """One GSKM update; arguments and result as :func:`kernels.kmeans.mean`.

    An entry whose mean direction vanishes keeps its direction; an entry without members stays as it is.
    """
    if x.is_cuda:
        from gsrq import gskm_triton

        return gskm_triton.gain_shape(x, weights, inverse, labels, entries)
    mass, (total, units) = sums(x, weights, labels, entries.shape[1], inverse)
    tiny = torch.finfo(mass.dtype).tiny
    # A unit-vector sum is compared with its largest possible length, the mass of the members that have a direction.
    length = units.norm(dim=-1, keepdim=True)
    old = entries / entries.norm(dim=-1, keepdim=True).clamp_min(tiny)
    shapes = torch.where(length > EPS * mass[..., None], units / length.clamp_min(tiny), old)
    gains = ((shapes * total).sum(-1) / mass.clamp_min(tiny)).clamp_min(0)
    return torch.where(mass[..., None] > 0, shapes * gains[..., None], entries), mass


def gskm(x: Tensor, count: int, weights: Tensor | None = None, *, start: str = "spherical", **options) -> Clustering:
    """Weighted GSKM: :func:`kernels.kmeans.cluster` with the gain-shape update; same arguments and errors.

    start="spherical" with warmup=0 is Algorithm 1 as printed; the default three rounds of warm-up avoid its collapse on some seeds.
    """
    return cluster(x, count, weights, update=gain_shape, start=start, **options)
