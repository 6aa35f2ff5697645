"""VQLLM: depth from bits, the std per token, strided groups, and training that helps."""

from types import SimpleNamespace

import pytest
import torch

from kvq.baselines.vqllm import VQLLM


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vqllm(bits, **options):
    defaults = {"group": 32, "entries": 256, "strided": False, "rounds": 4, "steps": 5, "batch": 300, "decay": 0.99}
    return VQLLM(bits, **{**defaults, **options})


def calibration(x):
    return SimpleNamespace(x=x, kind="key", layer=1)


@pytest.mark.parametrize("bits, dim, depth, stored", [(1, 128, 4, 1.125), (2, 128, 8, 2.125), (2, 64, 8, 2.25), (1, 16, 2, 2.0)])
def test_depth_and_stored_bits(bits, dim, depth, stored):
    codec = vqllm(bits, steps=0, rounds=1).fit(calibration(normal(1, 300, dim)))
    assert codec.codebook.shape == (depth, 256, min(32, dim)) and codec.codebook.dtype == torch.float16
    assert codec.bits == stored


def test_as_released_2_875_bits():
    codec = vqllm(2.75, entries=2048, steps=0, rounds=0, batch=600).fit(calibration(normal(1, 600, 128)))
    assert len(codec.codebook) == 8 and codec.bits == 2.875


def test_scale_is_the_unbiased_std_without_mean_removal():
    x = normal(1, 2, 6, 32) * 3 + 1
    codes = vqllm(1, steps=0).fit(calibration(normal(2, 300, 32))).encode(x)
    assert torch.allclose(codes["scale"].float(), x.std(-1), rtol=1e-3)


def test_error_follows_the_scale_of_the_token():
    x = normal(1, 2, 40, 32)
    codec = vqllm(2).fit(calibration(normal(2, 600, 32)))
    assert torch.equal(codec.encode(x * 1024)["codes"], codec.encode(x)["codes"])
    assert torch.equal(codec.decode(codec.encode(x * 1024)), codec.decode(codec.encode(x)) * 1024)


def test_strided_groups_are_a_permutation_of_the_channels():
    x, y = normal(2, 400, 64), normal(1, 2, 20, 64, seed=1)
    order = torch.arange(64).view(32, 2).T.flatten()  # group j holds channels j, j + 2, j + 4, ...
    strided = vqllm(1, strided=True).fit(calibration(x))
    plain = vqllm(1).fit(calibration(x[..., order]))
    assert torch.equal(strided.codebook, plain.codebook)
    assert torch.equal(strided.decode(strided.encode(y))[..., order], plain.decode(plain.encode(y[..., order])))


def test_residual_stages_are_greedy_and_summed():
    x = normal(1, 400, 32)
    codec = vqllm(0.5).fit(calibration(x))
    scale = codec.encode(x[None])["scale"].float()[0, 0, :, None]
    rest, total = x[0] / scale, 0
    for table in codec.codebook.float():
        entry = table[torch.cdist(rest.double(), table.double()).argmin(1)]
        rest, total = rest - entry, total + entry
    assert torch.allclose(codec.decode(codec.encode(x[None]))[0, 0], total * scale, atol=1e-5)


def test_training_improves_on_the_start():
    x, y = normal(2, 1500, 64), normal(1, 2, 300, 64, seed=1)
    errors = []
    for steps in (0, 20, 100):
        codec = vqllm(1, batch=500, steps=steps).fit(calibration(x))
        errors.append(float((codec.decode(codec.encode(y)) - y).square().mean()))
    assert errors[0] > errors[1] > errors[2]


def test_one_moving_average_step_by_hand():
    x = normal(1, 300, 32)
    before = vqllm(0.25, steps=0).fit(calibration(x)).codebook[0].double()
    after = vqllm(0.25, steps=1).fit(calibration(x)).codebook[0].double()
    unit = (x[0] / x[0].std(-1, keepdim=True)).double()
    member = torch.nn.functional.one_hot(torch.cdist(unit, before).argmin(1), 256).double()
    count, total = 0.99 + 0.01 * member.sum(0), 0.99 * before + 0.01 * member.T @ unit
    smooth = (count + 1e-5) / (count.sum() + 256e-5) * count.sum()
    assert torch.allclose(after, total / smooth[:, None], atol=3e-3)  # before, after and std are float16


def test_zeros_are_exact_and_constants_are_coded_undivided():
    codec = vqllm(1).fit(calibration(normal(1, 300, 32)))
    x = torch.zeros(1, 1, 3, 32)
    x[:, :, 1], x[:, :, 2] = 0.1, 1e-9
    codes = codec.encode(x)
    assert codes["scale"].flatten().tolist() == [0, 1, 0]
    assert codec.decode(codes)[:, :, [0, 2]].abs().max() == 0


@pytest.mark.parametrize(
    "bits, options, says",
    [
        (0.3, {}, "multiple of 0.25"),
        (0, {}, "multiple of 0.25"),
        (1, {"entries": 100}, "power of two"),
        (1, {"decay": 1.0}, "decay"),
        (1, {"batch": 0}, "batch"),
    ],
)
def test_bad_options(bits, options, says):
    with pytest.raises(ValueError, match=says):
        vqllm(bits, **options)


def test_shapes_that_cannot_be_served():
    with pytest.raises(ValueError, match="do not divide the head dimension 80"):
        vqllm(1).check(2, 80)
    with pytest.raises(ValueError, match="multiple of 0.5"):
        vqllm(0.75).check(2, 16)
    with pytest.raises(ValueError, match="at least 256 vectors"):
        vqllm(1).fit(calibration(normal(1, 100, 32)))


def test_std_beyond_float16_is_refused():
    with pytest.raises(ValueError, match="float16 range"):
        vqllm(1).fit(calibration(normal(1, 300, 32))).encode(normal(1, 1, 2, 32) * 1e6)
