"""Seeded random rotations: dense Haar matrices and signed Walsh-Hadamard transforms.

The Haar construction is the one of the public TurboQuant and Block-GTQ code, so that equal seeds give equal rotations.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor


def haar(dim: int, seed: int) -> Tensor:
    """Random rotation [dim, dim] float32 with determinant +1, uniform over the rotation group (Mezzadri 2007).

    numpy's default_rng(seed).standard_normal((dim, dim)) -> QR -> columns of Q times sign(diag R) -> column 0 negated if the
    determinant is negative. The global generators are not touched.
    """
    return torch.from_numpy(_haar(dim, seed).copy())


@functools.lru_cache(maxsize=256)
def _haar(dim: int, seed: int) -> np.ndarray:
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
    q = q * np.sign(np.diag(r))
    if np.linalg.slogdet(q)[0] < 0:
        q[:, 0] = -q[:, 0]
    return q.astype(np.float32)


def hadamard_signs(dim: int, seed: int) -> Tensor:
    """Random signs [dim] int8, +1 or -1, for :func:`hadamard`; raises ValueError unless dim is a power of two."""
    _check_power(dim)
    return torch.from_numpy(np.random.default_rng(seed).choice(np.array([-1, 1], dtype=np.int8), dim))


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last axis, in D log2(D) additions; it is its own inverse.

    x is [..., D] floating point; raises ValueError unless D is a power of two.
    """
    dim = x.shape[-1]
    _check_power(dim)
    y, half = x, 1
    while half < dim:
        pairs = y.unflatten(-1, (-1, 2, half))
        y = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).flatten(-3)
        half *= 2
    return y / math.sqrt(dim)


def _check_power(dim: int) -> None:
    if dim < 1 or dim & (dim - 1):
        raise ValueError(f"A Hadamard rotation needs a dimension that is a power of two, got {dim}; use a Haar rotation instead.")
