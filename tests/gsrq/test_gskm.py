"""The gain-shape update against its formulas and against Lloyd's, and GSKM against the values that theory and experiment give."""

import pytest
import torch

from gsrq.gskm import gain_shape, gskm
from kernels.kmeans import kmeans, mean, nearest, sums


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def points():
    draw = seeded()
    x = torch.randn(2, 400, 10, generator=draw) * torch.rand(2, 400, 1, generator=draw)
    weights = torch.rand(2, 400, generator=draw) + 0.1
    entries = 0.5 * torch.randn(2, 9, 10, generator=draw)
    return x, weights, 1 / x.norm(dim=-1), nearest(x, entries)[0], entries


def test_update_formulas(points):
    x, weights, inverse, labels, entries = points
    new, mass = gain_shape(*points)
    for g in range(2):
        for k in range(9):
            member = labels[g] == k
            w, v = weights[g, member, None], x[g, member]
            s = (w * v / v.norm(dim=-1, keepdim=True)).sum(0)
            s = s / s.norm()
            torch.testing.assert_close(new[g, k], ((w * v).sum(0) @ s / w.sum()).clamp_min(0) * s)
    torch.testing.assert_close(mass, sums(x, weights, labels, 9)[0])


def test_gain_is_the_best_for_its_direction(points):
    x, weights, _, labels, _ = points
    new, _ = gain_shape(*points)

    def error(entries):
        return (weights * (x - entries.gather(1, labels[..., None].expand_as(x))).square().sum(-1)).sum()

    assert all(error(new) <= error(new * c) for c in (0.9, 0.99, 1.01, 1.1))


def test_raw_directions_make_it_lloyds_step(points):
    x, weights, _, labels, entries = points
    raw = gain_shape(x, weights, torch.ones_like(weights), labels, entries)[0]
    torch.testing.assert_close(raw, mean(*points)[0])


def test_weights_over_norms_turn_raw_directions_into_unit_directions(points):
    x, weights, inverse, labels, entries = points
    unit = gain_shape(*points)[0]
    raw = mean(x, weights * inverse, inverse, labels, entries)[0]
    cosine = torch.nn.functional.cosine_similarity(unit, raw, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_equal_norms_make_it_lloyds_step(points):
    x, weights, _, labels, entries = points
    x = 3 * torch.nn.functional.normalize(x, dim=-1)
    inverse = 1 / x.norm(dim=-1)
    torch.testing.assert_close(gain_shape(x, weights, inverse, labels, entries)[0], mean(x, weights, inverse, labels, entries)[0])


def test_constant_weights_change_nothing(points):
    x = points[0]
    plain = gskm(x, 8, rounds=5, generator=seeded()).entries
    for weights in (torch.ones(2, 400), torch.full((2, 400), 4.0)):
        torch.testing.assert_close(gskm(x, 8, weights, rounds=5, generator=seeded()).entries, plain)
    weights = points[1]
    torch.testing.assert_close(gskm(x, 8, weights, rounds=5, generator=seeded()).entries, gskm(x, 8, 8 * weights, rounds=5, generator=seeded()).entries)


def test_scaling_the_data_scales_the_gains(points):
    x = points[0]
    one, many = (gskm(c * x, 8, rounds=5, generator=seeded()).entries for c in (1, 64))
    torch.testing.assert_close(64 * one, many)


def test_opposite_members_keep_the_old_direction():
    x = torch.tensor([[[1.0, 0], [-1, 0]]])
    old = torch.tensor([[[0.0, 0.5]]])
    new, mass = gain_shape(x, torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.int64), old)
    assert mass.item() == 2 and new.abs().max() == 0  # direction kept, projection zero


def test_zero_vectors_and_zero_weights_give_no_nan():
    x = torch.randn(1, 60, 6, generator=seeded())
    x[:, ::2] = 0
    assert gskm(x, 8, rounds=5, generator=seeded()).entries.isfinite().all()
    weights = torch.ones(1, 60)
    weights[:, :50] = 0
    assert gskm(x, 8, weights, rounds=5, generator=seeded()).entries.isfinite().all()
    assert gskm(x, 8, torch.zeros(1, 60), rounds=5, generator=seeded()).entries.isfinite().all()


def test_white_gaussian_anchor():
    """D=128, K=256 at 156 vectors per entry: held-out MSE .940 and cosine .248 for GSKM; k-means from the same start does as well.

    The rate-distortion bound at 1/16 bit is .917; mean-norm gains would give about 1.5.
    """
    draw = seeded(1)
    train, test = torch.randn(1, 40_000, 128, generator=draw), torch.randn(1, 20_000, 128, generator=draw)
    results = []
    for method in (gskm, kmeans):
        entries = method(train, 256, start="spherical", warmup=3, rounds=20, tolerance=1e-5, generator=seeded()).entries
        labels, scores = nearest(test, entries)
        own = entries[0][labels[0]]
        mse = (test.square().sum(-1) - 2 * scores).mean().item() / 128
        results.append((mse, torch.nn.functional.cosine_similarity(test[0], own, dim=-1).mean().item()))
    (mse, cosine), (other_mse, other_cosine) = results
    assert mse == pytest.approx(0.940, abs=0.002)
    assert cosine == pytest.approx(0.248, abs=0.003)
    assert other_mse == pytest.approx(mse, abs=0.001)
    assert other_cosine == pytest.approx(cosine, abs=0.002)
