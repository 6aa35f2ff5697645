"""The quantizer contract, for both codecs and all their options."""

import copy
import inspect
import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from blockgtq import BlockGTQ, TurboQuantMSE

CASES = {
    "tq": lambda bits=3, **o: TurboQuantMSE(bits, **o),
    "tq_exact": lambda bits=3, **o: TurboQuantMSE(bits, codebook="exact", gain="least_squares", rotation="hadamard", **o),
    "tq_center": lambda bits=3, **o: TurboQuantMSE(bits, rotation="none", center=True, norm_dtype="log8", **o),
    "gtq": lambda bits=3, **o: BlockGTQ(bits, **o),
    "gtq_exact": lambda bits=3, **o: BlockGTQ(bits, codebook="exact", gain="least_squares", score="qk_mse", **o),
    "gtq_center": lambda bits=3, **o: BlockGTQ(bits, center=True, norm_dtype="float32", b_max=6, **o),
    "gtq_split": lambda bits=3, **o: BlockGTQ(bits, partial="split", score="k_only", **o),
    "gtq_merge": lambda bits=3, **o: BlockGTQ(bits, partial="merge", **o),
}


@pytest.fixture(params=CASES)
def make(request):
    return CASES[request.param]


@pytest.fixture
def calibration(calibrate):
    return calibrate(rotary=24)


def held(codes):
    return sum(leaf.numel() * leaf.element_size() for leaf in codes.values())


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_shapes_and_measured_bits(make, calibration):
    codec = make().fit(calibration)
    x = calibration.x[None].expand(3, -1, -1, -1)
    codes = codec.encode(x)
    assert all(leaf.shape[0] == 3 and leaf.shape[2] == x.shape[2] for leaf in codes.values())
    assert codec.bits == 8 * held(codes) / x.numel()
    decoded = codec.decode(codes)
    assert decoded.shape == x.shape and decoded.dtype == torch.float32
    assert codec.block == 1 and codec.space == "post" and codec.grad_group is None
    assert not list(codec.parameters())


@pytest.mark.parametrize("bits", [1, 8])
def test_codes_do_not_depend_on_chunks_or_batch(make, calibration, bits, calibrate):
    codec = make(min(bits, 6)).fit(calibration)
    x = torch.stack([calibration.x, calibrate(rotary=24, seed=9).x])
    whole = codec.encode(x)
    pieces = [codec.encode(chunk) for chunk in x.split([1, 1, 5, 100, x.shape[2] - 107], 2)]
    assert equal(whole, {name: torch.cat([p[name] for p in pieces], 2) for name in whole})
    assert equal({name: leaf[1:] for name, leaf in whole.items()}, codec.encode(x[1:]))
    strided = codec.encode(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert equal(whole, strided)
    empty = codec.encode(x[:, :, :0])
    assert equal(empty, {name: leaf[:, :, :0] for name, leaf in whole.items()}) and codec.decode(empty).shape == x[:, :, :0].shape


def test_tiles_are_invisible(make, calibration, monkeypatch):
    codec = make().fit(calibration)
    x = calibration.x[None]
    whole = codec.encode(x)
    decoded = codec.decode(whole)
    monkeypatch.setattr("blockgtq.turboquant.TILE", 100)
    monkeypatch.setattr("blockgtq.quantizer.TILE", 100)
    assert equal(codec.encode(x), whole)
    torch.testing.assert_close(codec.decode(whole), decoded)


def test_error_falls_with_bits(make, calibration):
    x = calibration.x[None]
    errors = []
    for bits in range(1, 7):
        codec = make(bits).fit(calibration)
        errors.append((codec.decode(codec.encode(x)) - x).square().mean().item())
    # An 8-bit norm sets a floor of 6e-4 for the cases that use one; everywhere else a bit is worth a factor of 2.5 or more.
    assert all(b < a for a, b in itertools.pairwise(errors)) and errors[0] / errors[4] > 2.5**4 / 2


def test_fp16_and_bf16_input(make, calibration):
    codec = make(4).fit(calibration)
    for dtype in (torch.float16, torch.bfloat16):
        x = calibration.x[None].to(dtype)
        assert equal(codec.encode(x), codec.encode(x.float()))


def test_state_round_trip_without_fit(make, calibration):
    codec = make().fit(calibration)
    x = calibration.x[None]
    codes = codec.encode(x)
    stored = load(save(dict(codec.named_buffers())))
    restored = make()
    for name, buffer in stored.items():
        restored.register_buffer(name, buffer)
    assert restored.bits == codec.bits
    assert equal(restored.encode(x), codes) and torch.equal(restored.decode(codes), codec.decode(codes))
    assert equal(copy.deepcopy(codec).encode(x), codes)


def test_seeds_and_global_generator(make, calibration):
    state = torch.get_rng_state()
    x = calibration.x[None]
    codes = make(seed=1).fit(calibration).encode(x)
    assert equal(make(seed=1).fit(calibration).encode(x), codes)
    assert torch.equal(state, torch.get_rng_state())
    codec = make(seed=2).fit(calibration)
    assert getattr(codec, "rotation_kind", "haar") == "none" or not equal(codec.encode(x), codes)


def test_refit_replaces_everything(make, calibration, calibrate):
    codec = make().fit(calibration)
    codec.encode(calibration.x[None])
    other = calibrate(dim=64, rotary=24, seed=5)
    assert equal(codec.fit(other).encode(other.x[None]), make().fit(other).encode(other.x[None]))


def test_zeros_constants_and_extreme_norms(make, calibration):
    codec = make().fit(calibration)
    x = torch.zeros(1, 2, 6, 32)
    x[:, :, 1] = 1.0
    x[:, :, 2] = calibration.x[:, 0] * 1e-4 / calibration.x[:, 0].norm(dim=-1, keepdim=True)
    x[:, :, 3] = 1e-38
    x[:, :, 4] = calibration.x[:, 0] * 1e4 / calibration.x[:, 0].norm(dim=-1, keepdim=True)
    x[:, :, 5, 0] = 1e-30
    decoded = codec.decode(codec.encode(x))
    assert torch.isfinite(decoded).all()
    if codec.center:
        return
    assert (decoded[:, :, 0] == 0).all() and decoded[:, :, 3].abs().max() < 1e-7
    for token in (1, 2, 4):
        assert ((decoded[:, :, token] - x[:, :, token]).norm() / x[:, :, token].norm()) < 0.7


def test_norms_beyond_the_stored_range(make, calibration):
    codec = make().fit(calibration)
    x = calibration.x[None] * 1e12
    if codec.norm_dtype == "float32":
        assert torch.isfinite(codec.decode(codec.encode(x))).all()
    else:
        with pytest.raises(ValueError, match="norm_dtype=float32"):
            codec.encode(x)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_non_finite_input(make, calibration, bad):
    codec = make().fit(calibration)
    x = calibration.x[None].clone()
    x[0, 1, 7, 2] = bad
    with pytest.raises(ValueError, match=r"\[0, 1, 7, 2\]"):
        codec.encode(x)


def test_wrong_shape_and_missing_fit(make, calibration):
    with pytest.raises(RuntimeError, match="call fit"):
        make().encode(calibration.x[None])
    codec = make().fit(calibration)
    with pytest.raises(ValueError, match="was fitted for"):
        codec.encode(torch.zeros(1, 3, 4, 32))


def test_defaults_match_the_configuration():
    """The YAML lists the paper's options with the constructor's defaults, so that both ways of building a codec agree."""
    yaml = pytest.importorskip("yaml")
    for name in ("tq_mse", "blockgtq"):
        config = yaml.safe_load((Path(__file__).parents[2] / f"conf/quant/{name}.yaml").read_text())
        assert list(config) == ["bits", "key", "value", "sink", "window"]
        for part in ("key", "value"):
            codec = {"BlockGTQ": BlockGTQ, "TurboQuantMSE": TurboQuantMSE}[config[part]["_target_"].split(".")[-1]]
            options = {k: v for k, v in config[part].items() if k not in ("_target_", "_partial_", "bits")}
            defaults = {k: p.default for k, p in inspect.signature(codec).parameters.items() if k not in ("bits", "seed")}
            assert options == {k: defaults[k] for k in options}
            assert part == "value" or options.keys() == defaults.keys() - {"tile"}  # ours
