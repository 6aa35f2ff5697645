"""Gradient weights: scale-free, ln 2 at the median, and harmless when gradients say nothing."""

import math

import pytest
import torch

from gsrq.weights import gradient_norms, log_weights, raw_weights, weigh


def test_median_vector_gets_log_two_whatever_the_scale_of_the_loss():
    norms = torch.rand(3, 101, generator=torch.Generator().manual_seed(0))
    for scale in (1e-12, 1.0, 1e12):
        weights = log_weights(scale * norms)
        torch.testing.assert_close(weights.median(-1).values, torch.full((3,), math.log(2)), rtol=1e-4, atol=0)
        torch.testing.assert_close(weights, log_weights(norms), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ratio, compressed", [(529.7, 9.05), (406.1, 8.67)])
def test_range_that_figure_3_prints(ratio, compressed):
    weights = log_weights(torch.tensor([[1.0, 1.0, ratio]]))
    assert weights[0, 2].item() / weights[0, 0].item() == pytest.approx(compressed, abs=0.005)


def test_tau():
    norms = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(log_weights(norms, 10.0), torch.log1p(10 * norms / 2))


def test_norms_per_piece_from_squared_groups():
    gradient = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    groups = gradient.square().unflatten(-1, (-1, 8)).sum(-1)
    expected = torch.stack([gradient[:, :16].norm(dim=-1), gradient[:, 16:].norm(dim=-1)])
    torch.testing.assert_close(gradient_norms(groups, 2), expected)
    with pytest.raises(ValueError, match="3 pieces"):
        gradient_norms(groups, 3)


def test_silent_gradients_weigh_one():
    zeros = torch.zeros(1, 9)
    assert (log_weights(zeros) == 1).all() and (raw_weights(zeros) == 1).all()
    mostly = torch.zeros(1, 9)
    mostly[0, 0] = 5
    assert log_weights(mostly)[0, 0].item() == pytest.approx(math.log(2)) and log_weights(mostly).isfinite().all()


def test_refusals():
    assert weigh(None, 2, "none") is None
    with pytest.raises(ValueError, match="missing"):
        weigh(None, 2, "log")
    with pytest.raises(ValueError, match="not finite"):
        weigh(torch.full((4, 4), torch.nan), 2, "raw")
