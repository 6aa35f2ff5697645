"""GSRQ keeps the quantizer protocol, its stage identities and its budgets."""

import functools
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gsrq import GSRQ
from gsrq.gskm import gskm
from kernels import bitpack, rvq
from kernels.kmeans import kmeans
from kvq.quantizer import table_bytes

HEADS, DIM, ENTRIES = 2, 32, 64
QUICK = functools.partial(gskm, rounds=4)


def calibration(n=1200, heads=HEADS, dim=DIM, kind="key", layer=0, scale=1.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(heads * dim, heads * dim, generator=draw) / (heads * dim) ** 0.5
    x = (torch.randn(n, heads * dim, generator=draw) @ mix).view(n, heads, dim).transpose(0, 1) * scale
    grads = torch.rand(n, heads * dim // 8, generator=draw).square()
    return SimpleNamespace(x=x.contiguous(), kind=kind, layer=layer, seed=0, queries=None, grads=grads, pairs=None, inv_freq=None)


def make(bits=0.75, **options):
    return GSRQ(bits, **{"entries": ENTRIES, "cluster": QUICK, "piece": 32} | options)


@pytest.fixture(scope="module")
def codec():
    return make().fit(calibration())


@pytest.fixture(scope="module")
def x():
    return calibration(n=46, seed=3).x.view(HEADS, 2, 23, DIM).transpose(0, 1).contiguous()


def test_shapes_bytes_and_bits(codec, x):
    codes = codec.encode(x)
    packed = codes["codes"]
    assert packed.shape[:3] == (2, 1, 23) and packed.dtype == torch.uint8
    assert codec.bits == 8 * packed.numel() / x.numel() == 0.75
    out = codec.decode(codes)
    assert out.shape == x.shape and out.dtype == torch.float32
    assert (out - x).square().mean() < 0.8 * x.square().mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_input_is_coded_in_float32(codec, x, dtype):
    low = x.to(dtype)
    assert torch.equal(codec.encode(low)["codes"], codec.encode(low.float())["codes"])


def test_at_256_entries_a_token_takes_pieces_times_stages_bytes():
    codec = GSRQ(1, piece=32, cluster=QUICK).fit(calibration())
    assert codec.encode(calibration().x[None, :, :5])["codes"].shape == (1, 1, 5, 2 * 4)


def test_chunks_and_batch_items_are_independent(codec, x):
    whole = codec.encode(x)["codes"]
    parts = torch.cat([codec.encode(part)["codes"] for part in x.split([1, 9, 13], 2)], 2)
    alone = torch.cat([codec.encode(item)["codes"] for item in x.split(1)], 0)
    assert torch.equal(whole, parts) and torch.equal(whole, alone)


def test_error_is_the_last_residual_and_falls_stage_by_stage(codec):
    c = calibration()
    error = (codec.decode(codec.encode(c.x[None]))[0] - c.x).square().sum() / c.x.square().sum()
    # decode(encode) error = energy of what the last stage left over, logged per piece as a share of the piece's energy
    energy = c.x.transpose(0, 1).reshape(1200, 2, 32).square().sum((0, 2))
    last = (torch.tensor(codec.log[-1]["error"]) * energy).sum() / energy.sum()
    assert error.item() == pytest.approx(last.item(), rel=1e-4)
    path = [sum(stage["error"]) for stage in codec.log]
    assert len(path) == 4 and all(b < a for a, b in zip(path, path[1:], strict=False))


def test_error_falls_as_bits_rise(x):
    errors = [(c.decode(c.encode(x)) - x).square().mean().item() for c in (make(b).fit(calibration()) for b in (0.1875, 0.375, 0.75, 1.5))]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == 4


def test_later_stages_learn_from_the_stored_entries(codec):
    c = calibration()
    rest = (c.x.transpose(0, 1).reshape(1200, 2, 32).transpose(0, 1) / codec.scale).contiguous()
    assert codec.codebooks.dtype == torch.float16
    codes = rvq.encode(rest, codec.codebooks)
    left = rest - rvq.decode(codes, codec.codebooks)
    share = left.square().sum((1, 2)) / rest.square().sum((1, 2))
    torch.testing.assert_close(share, torch.tensor(codec.log[-1]["error"]), rtol=1e-4, atol=0)


def test_buffers_are_the_whole_state(codec, x, tmp_path):
    save_file(dict(codec.state_dict()), tmp_path / "codec.safetensors")
    twin = make()
    for name, tensor in load_file(tmp_path / "codec.safetensors").items():
        twin.register_buffer(name, tensor)
    codes = codec.encode(x)
    assert torch.equal(codes["codes"], twin.encode(x)["codes"])
    assert torch.equal(codec.decode(codes), twin.decode(codes)) and twin.bits == codec.bits


def test_seeds(codec, x):
    before = torch.get_rng_state()
    codes = codec.encode(x)["codes"]
    assert torch.equal(codes, make().fit(calibration()).encode(x)["codes"])
    for other in (make(seed=1).fit(calibration()), make().fit(calibration(layer=1)), make().fit(calibration(kind="value"))):
        assert not torch.equal(codes, other.encode(x)["codes"])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**12, 2.0**40])
def test_scaling_keeps_the_codes_and_scales_the_decoded(codec, x, scale):
    other = make().fit(calibration(scale=scale))
    codes = codec.encode(x)
    assert torch.equal(codes["codes"], other.encode(x * scale)["codes"])
    torch.testing.assert_close(codec.decode(codes) * scale, other.decode(codes))


def test_extreme_inputs_stay_finite_and_nan_is_refused(codec, x):
    for odd in (torch.zeros_like(x), x * 1e-30, x * 1e25, torch.ones_like(x)):
        assert codec.decode(codec.encode(odd)).isfinite().all()
    assert make().fit(calibration(scale=0.0)).encode(x)["codes"].shape == (2, 1, 23, 6)
    x = x.clone()
    x[1, 0, 7, 3] = torch.nan
    with pytest.raises(ValueError, match="token 7"):
        codec.encode(x)
    broken = calibration()
    broken.x[0, 4, 0] = torch.inf
    with pytest.raises(ValueError, match="token 4"):
        make().fit(broken)


def test_constant_and_duplicate_tokens():
    c = calibration()
    c.x[:] = c.x[:, :1]
    codec = make().fit(c)
    torch.testing.assert_close(codec.decode(codec.encode(c.x[None, :, :3]))[0], c.x[:, :3], rtol=2e-3, atol=2e-3)


def test_weights_steer_the_codebooks(x):
    plain = make().fit(calibration()).codebooks
    assert make(weights="log").grad_group == make(weights="raw").grad_group == 8 and make().grad_group is None
    weighted = calibration()
    assert not torch.equal(plain, make(weights="log").fit(weighted).codebooks)
    weighted.grads[:] = 3.0
    torch.testing.assert_close(plain.float(), make(weights="log").fit(weighted).codebooks.float(), rtol=0, atol=2e-3)
    weighted.grads = None
    with pytest.raises(ValueError, match="missing"):
        make(weights="log").fit(weighted)


def test_beam_codes_no_worse_and_decodes_the_same_way(x):
    narrow, wide = make().fit(calibration()), make(beam=4).fit(calibration())
    assert torch.equal(narrow.codebooks, wide.codebooks)
    greedy, beam = narrow.encode(x), wide.encode(x)
    assert (narrow.decode(beam) - x).square().mean() < (narrow.decode(greedy) - x).square().mean()


def test_eight_bit_codebooks_halve_the_tables_and_are_rounded_inside_the_fit(codec, x):
    c = calibration()
    small = make(codebook="float8").fit(c)
    assert small.codebooks.dtype == torch.float8_e4m3fn and table_bytes([small]) < 0.51 * table_bytes([codec]) and small.bits == codec.bits
    error = [(each.decode(each.encode(c.x[None]))[0] - c.x).square().mean().item() for each in (codec, small)]
    assert error[1] < 1.03 * error[0]
    rest = (c.x.transpose(0, 1).reshape(1200, 2, 32).transpose(0, 1) / small.scale).contiguous()
    left = rest - rvq.decode(rvq.encode(rest, small.codebooks), small.codebooks)
    share = left.square().sum((1, 2)) / rest.square().sum((1, 2))
    torch.testing.assert_close(share, torch.tensor(small.log[-1]["error"]), rtol=1e-4, atol=0)
    refined = make(codebook="float8", refine=1).fit(c)
    assert refined.codebooks.dtype == torch.float8_e4m3fn and refined.decode(refined.encode(x)).isfinite().all()


def test_eight_bit_entries_that_overflow_are_cut_and_made_up_for():
    c = calibration()
    c.x[0, :8] *= 1000  # one vector in 150 carries the energy: beyond 448 times the rms of all
    codec = make(codebook="float8", bits=1.5).fit(c)
    back = codec.decode(codec.encode(c.x[None]))[0]
    assert back.isfinite().all() and (back[0, :8] - c.x[0, :8]).norm() < 0.2 * c.x[0, :8].norm()


def test_k_means_is_the_same_class(x):
    codec = make(cluster=functools.partial(kmeans, rounds=4)).fit(calibration())
    assert (codec.decode(codec.encode(x)) - x).square().mean() < 0.8 * x.square().mean()


@pytest.mark.parametrize("bits, piece, stages", [(4, 128, 64), (2, 128, 32), (1, 128, 16), (0.75, 128, 12), (0.5, 128, 8), (0.375, 256, 12)])
def test_budgets_of_the_paper(bits, piece, stages):
    assert (GSRQ(bits).piece, GSRQ(bits).stages) == (piece, stages) == GSRQ(bits).check(8, 128)
    assert 8 * bitpack.packed_bytes(stages, 8) / piece == bits


def test_overrides():
    assert (GSRQ(0.375, piece=128).stages, GSRQ(0.375, stages=6).piece, GSRQ(1, piece=64, stages=8).stages) == (6, 128, 8)
    assert GSRQ(1, entries=16).stages == 32


def test_narrow_models_are_one_piece():
    assert GSRQ(0.375).check(2, 64) == (128, 6)
    assert GSRQ(1).check(2, 16) == (32, 4)
    with pytest.raises(ValueError, match="reachable are 0.25, 0.5"):
        GSRQ(0.375).check(2, 16)
    with pytest.raises(ValueError, match="piece can be one of .*96"):
        GSRQ(1).check(3, 64)
    with pytest.raises(ValueError, match="multiple of 8"):
        GSRQ(1, weights="log").check(1, 12)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"bits": 0.3}, "the paper has 0.375, 0.75, 1 and 2"),
        ({"bits": 0}, "above 0"),
        ({"bits": 9}, "at most 8"),
        ({"bits": 1, "entries": 100}, "power of two"),
        ({"bits": 1, "weights": "fisher"}, "log, raw or none"),
        ({"bits": 1, "beam": 0}, "greedy"),
        ({"bits": 1, "space": "both"}, "pre or post"),
        ({"bits": 1, "codebook": "int4"}, "float16 or float8"),
        ({"bits": 1, "tau": 0.0}, "positive"),
        ({"bits": 1, "piece": 12}, "multiple of"),
        ({"bits": 1, "piece": 64, "stages": 4}, "asks for 8 stages"),
        ({"bits": 0.3, "stages": 16}, "must be whole"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        GSRQ(**options)


def test_no_tokens_and_no_codebooks(codec, x):
    nothing = codec.encode(x[:, :, :0])
    assert nothing["codes"].shape == (2, 1, 0, 6) and codec.decode(nothing).shape == (2, HEADS, 0, DIM)
    with pytest.raises(RuntimeError, match="call fit"):
        make().encode(x)


def test_too_little_calibration():
    with pytest.raises(ValueError, match="at least 64"):
        make().fit(calibration(n=63))
