"""Rotations are orthogonal, seeded, equal to the public code's, and leave the global generators alone."""

import math

import numpy as np
import pytest
import torch

from kernels.rotate import haar, hadamard, hadamard_signs


def test_haar_equals_the_public_construction():
    small = haar(4, 44)
    assert small[0].tolist() == pytest.approx([0.77655, 0.00629, 0.32632, 0.53893], abs=1e-5)
    assert small.trace().item() == pytest.approx(1.94928, abs=1e-5)
    large = haar(128, 42)
    assert large[0, :4].tolist() == pytest.approx([0.02826, -0.08672, 0.07183, 0.08695], abs=1e-5)
    assert large.trace().item() == pytest.approx(0.18038, abs=1e-5)


@pytest.mark.parametrize("dim", [1, 2, 3, 50, 128])
def test_haar_is_a_rotation(dim):
    r = haar(dim, 7)
    assert r.dtype == torch.float32
    torch.testing.assert_close(r @ r.T, torch.eye(dim), rtol=0, atol=2e-6)
    assert torch.linalg.det(r.double()).item() == pytest.approx(1, abs=1e-5)


def test_haar_is_seeded_and_a_private_copy():
    haar(8, 1).zero_()
    assert torch.equal(haar(8, 1), haar(8, 1)) and haar(8, 1).abs().sum() > 0
    assert not torch.equal(haar(8, 1), haar(8, 2))


def test_global_generators_are_untouched():
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    haar(6, 3)
    hadamard_signs(8, 3)
    assert np.array_equal(before, np.random.get_state()[1]) and torch.equal(torch_before, torch.get_rng_state())


@pytest.mark.parametrize("dim", [1, 2, 8, 64])
def test_hadamard_is_orthonormal_and_its_own_inverse(dim):
    h = hadamard(torch.eye(dim))
    torch.testing.assert_close(h.abs(), torch.full((dim, dim), 1 / math.sqrt(dim)))
    torch.testing.assert_close(h @ h.T, torch.eye(dim))
    x = torch.randn(2, 3, dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    torch.testing.assert_close(hadamard(x), x @ h)


def test_hadamard_signs():
    signs = hadamard_signs(64, 5)
    assert signs.dtype == torch.int8 and set(signs.tolist()) == {-1, 1}
    assert torch.equal(signs, hadamard_signs(64, 5)) and not torch.equal(signs, hadamard_signs(64, 6))


@pytest.mark.parametrize("dim", [0, 3, 96])
def test_hadamard_needs_a_power_of_two(dim):
    with pytest.raises(ValueError, match="power of two"):
        hadamard_signs(dim, 0)
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.zeros(2, dim))
