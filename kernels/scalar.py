"""Scalar codebooks: converged Lloyd-Max levels for N(0, 1) and for one coordinate of a random unit vector.

Optimality: every level is the centroid of its cell, every threshold the midpoint of its neighbours (Lloyd 1982, Max 1960).
Plain Lloyd iterations need thousands of rounds at 8 bits, so the conditions are solved by Newton's method, whose Jacobian is
tridiagonal, from the high-resolution start with point density proportional to density**(1/3) (Panter and Dite 1951).
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

MAX_BITS = 8


def gaussian_levels(bits: int) -> Tensor:
    """Levels [2**bits] float64, ascending, minimising the mean squared error on N(0, 1).

    Raises ValueError if bits is not an integer from 1 to 8.
    """
    return torch.tensor(_gaussian(_checked(bits)), dtype=torch.float64)


def sphere_levels(bits: int, dim: int) -> Tensor:
    """Levels [2**bits] float64, ascending, for sqrt(dim) times one coordinate of a uniform unit vector in `dim` dimensions.

    The coordinate has density proportional to (1 - t^2)^((dim - 3) / 2) on [-1, 1]: arcsine for dim 2, uniform for dim 3, and
    close to N(0, 1/dim) for large dim. The factor sqrt(dim) gives unit variance, so that the levels can replace
    :func:`gaussian_levels`. Raises ValueError if bits is not an integer from 1 to 8 or dim is below 2.
    """
    if dim < 2:
        raise ValueError(f"The coordinate of a unit vector has a density only in 2 or more dimensions, got {dim}.")
    return torch.tensor(_sphere(_checked(bits), dim), dtype=torch.float64)


def midpoints(levels: Tensor) -> Tensor:
    """Decision thresholds [..., n - 1] between ascending levels [..., n]."""
    return (levels[..., 1:] + levels[..., :-1]) / 2


def nearest(y: Tensor, levels: Tensor) -> Tensor:
    """Index, int32 in the shape of y, of the level nearest to each value; levels [n] are ascending and in y's dtype.

    A value exactly on a threshold takes the lower level. NaN is not detected here.
    """
    return torch.bucketize(y.contiguous(), midpoints(levels), out_int32=True)


def _checked(bits: int) -> int:
    if bits != int(bits) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be an integer from 1 to {MAX_BITS}, got {bits}.")
    return int(bits)


@functools.cache
def _gaussian(bits: int) -> tuple[float, ...]:
    half = 2 ** (bits - 1)
    quantile = torch.special.ndtri((torch.arange(half, dtype=torch.float64) + 0.5) / (2 * half) + 0.5)

    def density(t: Tensor) -> Tensor:
        return torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)

    def tail(t: Tensor) -> Tensor:
        return torch.special.erfc(t / math.sqrt(2)) / 2

    # density**(1/3) is the density of N(0, 3); the integral of t * density from t to infinity is the density itself.
    return _lloyd_max(math.sqrt(3) * quantile, math.inf, density, tail, density)


@functools.cache
def _sphere(bits: int, dim: int) -> tuple[float, ...]:
    half = 2 ** (bits - 1)
    # With t = sin(angle), density**(1/3) dt is cos(angle)**(dim / 3) d(angle): smooth even where the density itself diverges.
    angle = np.linspace(0, np.pi / 2, 20001)
    weight = np.cos(angle) ** (dim / 3)
    cumulative = np.concatenate([[0], np.cumsum(weight[1:] + weight[:-1])])
    start = np.sin(np.interp((np.arange(half) + 0.5) / half, cumulative / cumulative[-1], angle))
    total = 2 * _cosine_integral(torch.tensor(math.pi / 2, dtype=torch.float64), dim - 2)

    def density(t: Tensor) -> Tensor:
        return (1 - t * t) ** ((dim - 3) / 2) / total

    def tail(t: Tensor) -> Tensor:
        return 0.5 - _cosine_integral(torch.asin(t), dim - 2) / total

    def tail_moment(t: Tensor) -> Tensor:
        return (1 - t * t) ** ((dim - 1) / 2) / ((dim - 1) * total)

    levels = _lloyd_max(torch.from_numpy(start), 1.0, density, tail, tail_moment)
    return tuple(level * math.sqrt(dim) for level in levels)


def _cosine_integral(angle: Tensor, power: int) -> Tensor:
    """Integral of cos**power from 0 to angle, by the reduction formula, whose terms are all non-negative on [0, pi/2]."""
    value = angle if power % 2 == 0 else torch.sin(angle)
    for n in range(2 + power % 2, power + 1, 2):
        value = torch.cos(angle) ** (n - 1) * torch.sin(angle) / n + (n - 1) / n * value
    return value


def _lloyd_max(
    start: Tensor,
    upper: float,
    density: Callable[[Tensor], Tensor],
    tail: Callable[[Tensor], Tensor],
    tail_moment: Callable[[Tensor], Tensor],
) -> tuple[float, ...]:
    """Both halves of the symmetric optimum, from a start [half] for the positive levels of a density on (-upper, upper)."""
    c = start.clone()
    ends = torch.tensor([0.0, upper], dtype=torch.float64)
    previous = math.inf
    for _ in range(200):
        inner = midpoints(c)
        edges = torch.cat([ends[:1], inner, ends[1:]])
        mass = tail(edges[:-1]) - tail(edges[1:])
        centroid = (tail_moment(edges[:-1]) - tail_moment(edges[1:])) / mass
        residual = c - centroid
        error = float(residual.abs().max() / c[-1])
        # Quadratic convergence ends where the rounding of `mass` in the outermost cells takes over, well below 1e-9.
        if error == 0 or previous <= error < 1e-9:
            return tuple(torch.cat([-c.flip(0), c]).tolist())
        previous = error
        # Derivative of a centroid with respect to its lower and upper edge, each edge moving half as fast as a level.
        below = density(inner) * (centroid[1:] - inner) / mass[1:] / 2
        above = density(inner) * (inner - centroid[:-1]) / mass[:-1] / 2
        jacobian = torch.eye(len(c), dtype=torch.float64) - torch.diag(below, -1) - torch.diag(above, 1)
        jacobian -= torch.diag(torch.nn.functional.pad(below, (1, 0)) + torch.nn.functional.pad(above, (0, 1)))
        step = torch.linalg.solve(jacobian, residual)
        while not _ordered(c - step, upper):
            step = step / 2
        c = c - step
    raise RuntimeError(f"Lloyd-Max levels did not converge: relative residual {previous:.1e} after 200 Newton steps.")


def _ordered(c: Tensor, upper: float) -> bool:
    return bool(c[0] > 0 and c[-1] < upper and (c[1:] > c[:-1]).all())


def consecutive(levels: Tensor) -> bool:
    """Whether levels [n] are start, start + 1, ..., all of them integers of at most 1024 in size: what `kernels.affine_triton.levels` gives exactly."""
    start = levels[:1].double()
    return bool((levels.double() == start + torch.arange(len(levels), device=levels.device)).all() and (start == start.round()).all() and (levels.abs() <= 1024).all())
