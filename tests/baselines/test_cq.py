"""CQ: the codes that its names promise, tables per head and group, and what the gradients' weight trades."""

from types import SimpleNamespace

import pytest
import torch

from kvq.baselines.cq import CQ


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cq(bits, **options):
    return CQ(bits, **{"coupled": None, "code_bits": None, "weights": "uniform", "rounds": 10, "tolerance": 0.0, **options})


def calibration(x, grads=None):
    return SimpleNamespace(x=x, kind="value", layer=0, grads=grads)


@pytest.mark.parametrize("bits, coupled, entries", [(4, 2, 256), (2, 4, 256), (1, 8, 256), (1.25, 8, 1024)])
def test_bits_choose_the_coupling(bits, coupled, entries):
    codec = cq(bits, rounds=1).fit(calibration(normal(2, 1100, 32)))
    assert codec.codebook.shape == (2, 32 // coupled, entries, coupled) and codec.codebook.dtype == torch.float16
    assert codec.bits == bits


def test_a_head_with_ragged_codes_pays_for_whole_bytes():
    assert cq(1.25, rounds=1).fit(calibration(normal(1, 1100, 16))).bits == 1.5  # 2 codes of 10 bits in 3 bytes


@pytest.mark.parametrize("bits, coupled, code_bits", [(2.25, 4, 9), (0.75, 16, 12), (0.375, 32, 12)])
def test_other_couplings_on_request(bits, coupled, code_bits):
    assert cq(bits, coupled=coupled, code_bits=code_bits).code_bits == code_bits


def test_codes_are_the_nearest_entries():
    x = normal(2, 400, 8)
    codec = cq(2).fit(calibration(x))
    decoded = codec.decode(codec.encode(x[None]))[0]
    for head, group in [(0, 0), (1, 1)]:
        vectors = x[head, :, 4 * group : 4 * group + 4]
        entries = codec.codebook[head, group].float()
        nearest = entries[torch.cdist(vectors.double(), entries.double()).argmin(1)]
        assert torch.equal(decoded[head, :, 4 * group : 4 * group + 4], nearest)


def test_few_distinct_vectors_are_exact():
    levels = normal(1, 8, 4).half().float()
    x = levels[:, torch.arange(400) % 8]
    codec = cq(2).fit(calibration(x))
    assert torch.equal(codec.decode(codec.encode(x[None]))[0], x)


def test_fisher_weights_lower_the_weighted_error_and_raise_the_plain_one():
    x = normal(1, 4000, 16)
    grads = normal(4000, 2, seed=3).exp().pow(3)
    errors = {}
    for weights in ("uniform", "fisher"):
        codec = cq(1, weights=weights, rounds=30).fit(calibration(x, grads))
        square = (codec.decode(codec.encode(x[None]))[0] - x).square().view(4000, 2, 8).sum(2)
        errors[weights] = float(square.mean()), float((grads * square).sum() / grads.sum())
    assert errors["fisher"][0] > errors["uniform"][0]
    assert errors["fisher"][1] < 0.8 * errors["uniform"][1]


def test_the_size_of_the_gradients_does_not_matter():
    x, grads = normal(2, 600, 16), normal(600, 4, seed=3).square()
    tables = [cq(1, weights="fisher").fit(calibration(x, grads * size)).codebook for size in (1.0, 2.0**-60)]
    assert torch.equal(*tables)


def test_gradients_reach_their_own_head_and_group():
    x = normal(2, 600, 16)
    base = cq(1, weights="fisher").fit(calibration(x, torch.ones(600, 4))).codebook
    grads = torch.ones(600, 4)
    grads[:300, 3] = 100.0  # head 1, group 1
    moved = (cq(1, weights="fisher").fit(calibration(x, grads)).codebook != base).flatten(2).any(2)
    assert moved.tolist() == [[False, False], [False, True]]


def test_grad_group_asks_for_gradients_only_when_weighted():
    assert cq(2, weights="fisher").grad_group == 4 and cq(2).grad_group is None
    with pytest.raises(ValueError, match="squared gradients"):
        cq(2, weights="fisher").fit(calibration(normal(1, 300, 8)))


@pytest.mark.parametrize(
    "bits, options, says",
    [
        (3, {}, r"4 \(2c8b\), 2 \(4c8b\), 1 \(8c8b\), 1.25 \(8c10b\)"),
        (2, {"coupled": 4}, "together"),
        (2, {"coupled": 4, "code_bits": 9}, "2.25 bits per value, not 2"),
        (17, {"coupled": 1, "code_bits": 17}, "1 to 16 bits"),
        (2, {"weights": "hessian"}, "'uniform' or 'fisher'"),
    ],
)
def test_bad_options(bits, options, says):
    with pytest.raises(ValueError, match=says):
        cq(bits, **options)


def test_shapes_that_cannot_be_served():
    with pytest.raises(ValueError, match="do not divide the head dimension 12"):
        cq(1).check(2, 12)
    with pytest.raises(ValueError, match="at least 256 vectors"):
        cq(2).fit(calibration(normal(1, 100, 8)))
