"""Stored norms: three precisions, zero kept, overflow refused."""

import pytest
import torch

from blockgtq.gain import NORM_BYTES, channel_mean, load_norm, prepare, solve_gain, store_norm

RELATIVE = {"float32": 1e-7, "float16": 2**-11, "log8": 2 ** (1 / 16) - 1}


@pytest.mark.parametrize("norm_dtype", NORM_BYTES)
def test_round_trip(norm_dtype):
    gain = torch.logspace(-3, 4, 1000, dtype=torch.float64)
    stored = store_norm(gain, norm_dtype)
    assert stored.element_size() == NORM_BYTES[norm_dtype]
    assert ((load_norm(stored, norm_dtype) - gain).abs() / gain).max() <= RELATIVE[norm_dtype] * (1 + 1e-6)


@pytest.mark.parametrize("norm_dtype", NORM_BYTES)
def test_zero_and_tiny_gains(norm_dtype):
    restored = load_norm(store_norm(torch.tensor([0.0, 1e-40, 1e-9], dtype=torch.float64), norm_dtype), norm_dtype)
    assert restored[0] == 0 and torch.isfinite(restored).all() and restored.max() <= 1.1e-9


@pytest.mark.parametrize(("norm_dtype", "limit"), [("float16", 65504.0), ("log8", 60000.0), ("float32", 3e38)])
def test_overflow_is_an_error_and_never_inf(norm_dtype, limit):
    assert torch.isfinite(load_norm(store_norm(torch.tensor([limit], dtype=torch.float64), norm_dtype), norm_dtype)).all()
    with pytest.raises(ValueError, match="norm_dtype=float32"):
        store_norm(torch.tensor([1.0, 1.2 * limit], dtype=torch.float64), norm_dtype)


def test_least_squares_is_the_best_factor():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    inner, power, norm = (x * y).sum(-1), (y * y).sum(-1), x.norm(dim=-1)

    def error(gain):
        return (x - gain[:, None] * y).norm(dim=-1)

    best = solve_gain(norm, inner, power, "least_squares")
    assert (error(best) <= error(best * 1.01)).all() and (error(best) <= error(best * 0.99)).all()
    torch.testing.assert_close((solve_gain(norm, inner, power, "unit_norm")[:, None] * y).norm(dim=-1), norm)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_prepare_says_where(bad):
    x = torch.zeros(2, 1, 3, 4, dtype=torch.float16)
    x[1, 0, 2, 3] = bad
    with pytest.raises(ValueError, match=r"Cannot encode: value (nan|inf) at .* = \[1, 0, 2, 3\]"):
        prepare(x, None)


def test_channel_mean():
    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(channel_mean(x), x.mean(1))
    x[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        channel_mean(x)
