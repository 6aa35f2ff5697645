"""Scalar codebooks reach the known Lloyd-Max distortions and the exact solutions where those have a closed form."""

import math

import pytest
import torch

from kernels.scalar import gaussian_levels, midpoints, nearest, sphere_levels

LLOYD_MAX = [0.36338, 0.11748, 0.034548, 9.501e-3, 2.505e-3, 6.442e-4, 1.635e-4, 4.119e-5]


def distortion(levels, grid, density):
    """Mean squared error under a density given on a fine uniform grid."""
    density = density / density.sum()
    return float(((grid - levels[nearest(grid, levels)]).square() * density).sum())


@pytest.mark.parametrize("bits", range(1, 9))
def test_gaussian_distortion_is_optimal(bits):
    grid = torch.linspace(-10, 10, 400_001, dtype=torch.float64)
    assert distortion(gaussian_levels(bits), grid, torch.exp(-grid * grid / 2)) == pytest.approx(LLOYD_MAX[bits - 1], rel=1e-3)


def test_gaussian_levels_of_max_1960():
    assert gaussian_levels(1).tolist() == pytest.approx([-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)], abs=1e-12)
    assert gaussian_levels(2)[2:].tolist() == pytest.approx([0.4528, 1.5104], abs=1e-4)
    assert gaussian_levels(3)[4:].tolist() == pytest.approx([0.2451, 0.7560, 1.3439, 2.1519], abs=1e-4)
    assert gaussian_levels(4)[8:].tolist() == pytest.approx(
        [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326], abs=1e-4
    )


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("dim", [0, 2, 3, 4, 7, 30, 128])  # 0: the Gaussian
def test_levels_are_ordered_symmetric_centroids(bits, dim):
    levels = sphere_levels(bits, dim) if dim else gaussian_levels(bits)
    assert levels.dtype == torch.float64 and levels.shape == (2**bits,)
    assert (levels.diff() > 0).all() and torch.equal(levels, -levels.flip(0))
    edge = math.sqrt(dim) if dim else 10.0
    limits = torch.nn.functional.pad(midpoints(levels), (1, 1), value=edge)
    limits[0] = -edge
    # t = edge * sin(angle) keeps the integrand smooth for the arcsine density.
    for i in {0, 1, 2**bits // 3, 2**bits - 1}:
        low, high = torch.asin(limits[i] / edge), torch.asin(limits[i + 1] / edge)
        angle = torch.linspace(float(low), float(high), 20_001, dtype=torch.float64)
        t = edge * torch.sin(angle)
        weight = torch.cos(angle) ** (dim - 2) if dim else torch.exp(-t * t / 2) * torch.cos(angle)
        assert float(torch.trapezoid(t * weight, angle) / torch.trapezoid(weight, angle)) == pytest.approx(
            levels[i].item(), abs=1e-6
        )


@pytest.mark.parametrize("bits", range(1, 9))
def test_three_dimensions_are_uniform(bits):
    n = 2**bits
    expected = (2 * torch.arange(n, dtype=torch.float64) + 1 - n) / n * math.sqrt(3)
    torch.testing.assert_close(sphere_levels(bits, 3), expected, rtol=0, atol=1e-12)


def test_two_dimensions_are_arcsine():
    assert sphere_levels(1, 2)[1].item() == pytest.approx(math.sqrt(2) * 2 / math.pi, abs=1e-12)


def test_large_dimension_is_gaussian():
    torch.testing.assert_close(sphere_levels(4, 4096), gaussian_levels(4), rtol=1e-2, atol=1e-3)


def test_exact_marginal_beats_gaussian_in_small_dimensions():
    angle = torch.linspace(-math.pi / 2, math.pi / 2, 200_001, dtype=torch.float64)
    for dim in (2, 4, 8):
        t, weight = math.sqrt(dim) * torch.sin(angle), torch.cos(angle) ** (dim - 2)
        for bits in (3, 5, 8):
            assert distortion(sphere_levels(bits, dim), t, weight) < 0.9 * distortion(gaussian_levels(bits), t, weight)


def test_nearest_and_ties():
    levels = torch.tensor([-1.0, 0.0, 2.0])
    assert nearest(torch.tensor([-9.0, -0.5, -0.4, 1.0, 1.1, 9.0]), levels).tolist() == [0, 0, 1, 1, 2, 2]
    y = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = gaussian_levels(5)
    assert torch.equal(nearest(y, levels), (y.unsqueeze(-1) - levels).abs().argmin(-1).int())


def test_levels_are_private_copies():
    gaussian_levels(2).zero_()
    assert gaussian_levels(2)[0] < 0


@pytest.mark.parametrize("bits", [0, 9, 2.5])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match="1 to 8"):
        gaussian_levels(bits)


def test_dimension_out_of_range():
    with pytest.raises(ValueError, match="2 or more"):
        sphere_levels(2, 1)
