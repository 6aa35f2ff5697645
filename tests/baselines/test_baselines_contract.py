"""What every baseline promises: shape, exact bits, chunks equal to the whole, buffers as the only state, loud refusals."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save

from kvq.baselines.cq import CQ
from kvq.baselines.fp8 import FP8
from kvq.baselines.fp16 import FP16
from kvq.baselines.integer import Integer
from kvq.baselines.kivi import KIVI, KIVIScaleOnly
from kvq.baselines.vqllm import VQLLM
from kvq.baselines.zero import Zero

HEADS, DIM, TOKENS = 2, 32, 128
CQ_SHORT = partial(CQ, coupled=None, code_bits=None, weights="uniform", rounds=4, tolerance=0.0)
VQLLM_SHORT = partial(VQLLM, group=32, entries=256, rounds=2, steps=3, batch=200, decay=0.99)
CODECS = {
    "fp16": partial(FP16, 16),
    "zero": partial(Zero, 0),
    "fp8_tensor": partial(FP8, 8, granularity="tensor", space="post"),
    "fp8_token_head": partial(FP8, 8, granularity="token_head", space="post"),
    "int4": partial(Integer, 4, symmetric=False, space="post"),
    "int8_symmetric": partial(Integer, 8, symmetric=True, space="post"),
    "kivi_key": partial(KIVI, 2, axis="channel", group=32),
    "kivi_value": partial(KIVI, 2, axis="token", group=32),
    "kivi_wide": partial(KIVI, 3, axis="token", group=128),
    "kivi_scale_only": partial(KIVIScaleOnly, 3, group=32, calibration_tokens=64),
    "cq_2c8b": partial(CQ_SHORT, 4),
    "cq_4c8b": partial(CQ_SHORT, 2),
    "cq_4c9b": partial(CQ_SHORT, 2.25, coupled=4, code_bits=9),
    "cq_fisher": partial(CQ_SHORT, 1, weights="fisher"),
    "vqllm_key": partial(VQLLM_SHORT, 1, strided=True),
    "vqllm_value": partial(VQLLM_SHORT, 2, strided=False),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibration(codec, x=None, dim=DIM):
    x = normal(HEADS, 600, dim, seed=1) if x is None else x
    grads = None
    if codec.grad_group:
        grads = normal(x.shape[1], HEADS * dim // codec.grad_group, seed=2).square()
    return SimpleNamespace(x=x, kind="key", layer=3, seed=0, queries=None, grads=grads, positions=None, sample_length=600)


def encode(codec, x, state=None):
    if getattr(codec, "stateful", False):
        return codec.encode(x, {} if state is None else state)
    return codec.encode(x)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def restored(make, codec):
    """A second codec that gets the buffers of the first through safetensors, and is never fitted."""
    twin = make()
    for name, tensor in load(save({name: t.contiguous() for name, t in codec.named_buffers()})).items():
        twin.register_buffer(name, tensor)
    return twin


@pytest.fixture(params=CODECS)
def make(request):
    return CODECS[request.param]


@pytest.fixture
def codec(make):
    codec = make(seed=5)
    assert codec.fit(calibration(codec)) is codec
    return codec


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shape_dtype_and_bits(codec, dtype):
    x = normal(3, HEADS, TOKENS, DIM).to(dtype)
    codes = encode(codec, x)
    decoded = codec.decode(codes)
    assert decoded.shape == x.shape and decoded.dtype == torch.float32 and decoded.isfinite().all()
    stored = sum(leaf.numel() * leaf.element_size() for leaf in codes.values())
    assert codec.bits == 8 * stored / x.numel()
    for leaf in codes.values():
        assert leaf.shape[0] == 3 and leaf.shape[2] in (TOKENS, TOKENS // codec.block)


def test_chunks_equal_the_whole(codec):
    x = normal(2, HEADS, TOKENS, DIM)
    state, parts, begin = {}, [], 0
    for blocks in (1, 0, 2, 1) if codec.block > 1 else (1, 0, 63, 64):
        parts.append(encode(codec, x[:, :, begin : begin + blocks * codec.block], state))
        begin += blocks * codec.block
    assert begin == TOKENS
    whole = encode(codec, x)
    assert same({k: torch.cat([part[k] for part in parts], 2) for k in whole}, whole)
    assert codec.decode(parts[1]).shape == (2, HEADS, 0, DIM)


def test_batch_items_are_independent(codec):
    x = normal(3, HEADS, TOKENS, DIM)
    whole = encode(codec, x)
    assert same({k: v[1:2] for k, v in whole.items()}, encode(codec, x[1:2]))


def test_strided_input_codes_alike(codec):
    x = normal(2, HEADS, TOKENS, DIM)
    assert same(encode(codec, x.transpose(1, 2).contiguous().transpose(1, 2)), encode(codec, x))


def test_buffers_restore_without_fit(make, codec):
    x = normal(2, HEADS, TOKENS, DIM)
    twin = restored(make, codec)
    codes = encode(codec, x)
    assert twin.bits == codec.bits
    assert same(codes, encode(twin, x))
    assert torch.equal(codec.decode(codes), twin.decode(codes))


def test_one_seed_one_codec_and_no_global_draws(make):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    x = normal(1, HEADS, TOKENS, DIM)
    runs = []
    for _ in range(2):
        codec = make(seed=5)
        runs.append(encode(codec.fit(calibration(codec)), x))
    assert same(*runs)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input_is_refused(codec, value):
    x = normal(2, HEADS, TOKENS, DIM)
    x[1, 0, 7, 3] = value
    with pytest.raises(ValueError, match=r"\[1, 0, 7, 3\] is (NaN|infinite)"):
        encode(codec, x)


@pytest.mark.parametrize("x", [torch.zeros(()), torch.tensor(5.1), torch.tensor(-1e-7), torch.tensor(1e-30), torch.tensor(3e4)])
def test_constants_stay_finite(codec, x):
    decoded = codec.decode(encode(codec, x.expand(1, HEADS, TOKENS, DIM)))
    assert decoded.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-4, 1e3, 5e3])
def test_extreme_norms_stay_finite(codec, scale):
    assert codec.decode(encode(codec, normal(1, HEADS, TOKENS, DIM) * scale)).isfinite().all()


@pytest.mark.parametrize("constant", [0.0, 2.0])
def test_constant_calibration(make, constant):
    codec = make(seed=0)
    codec.fit(calibration(codec, torch.full((HEADS, 600, DIM), constant)))
    assert codec.decode(encode(codec, normal(1, HEADS, TOKENS, DIM))).isfinite().all()


def test_zeros_come_back_as_zeros(codec):
    decoded = codec.decode(encode(codec, torch.zeros(1, HEADS, TOKENS, DIM)))
    if not isinstance(codec, (CQ, KIVIScaleOnly)):  # these two code against calibrated levels, which need not include zero
        assert decoded.abs().max() == 0


def test_wrong_shapes_and_missing_fit_are_refused(make, codec):
    with pytest.raises(ValueError, match=f"{HEADS}, tokens, {DIM}"):
        encode(codec, normal(1, HEADS + 1, TOKENS, DIM))
    with pytest.raises(RuntimeError, match="no calibration"):
        encode(make(), normal(1, HEADS, TOKENS, DIM))
    if codec.block > 1:
        with pytest.raises(ValueError, match="multiple of the block"):
            encode(codec, normal(1, HEADS, TOKENS - 1, DIM))


LADDERS = {
    "integer": [partial(Integer, b, symmetric=False, space="post") for b in range(2, 9)],
    "integer_symmetric": [partial(Integer, b, symmetric=True, space="post") for b in range(2, 9)],
    "kivi_key": [partial(KIVI, b, axis="channel", group=32) for b in (1, 2, 3, 4)],
    "kivi_value": [partial(KIVI, b, axis="token", group=32) for b in (1, 2, 3, 4)],
    "kivi_scale_only": [partial(KIVIScaleOnly, b, group=32, calibration_tokens=64) for b in (1, 2, 3, 4)],
    "cq": [partial(CQ_SHORT, b) for b in (1, 2, 4)],
    "cq_fisher": [partial(CQ_SHORT, b, weights="fisher") for b in (1, 2, 4)],
    "vqllm": [partial(VQLLM_SHORT, b, strided=True) for b in (0.5, 1, 2, 3)],
}


@pytest.mark.parametrize("ladder", LADDERS)
def test_error_falls_as_bits_rise(ladder):
    x = normal(1, HEADS, TOKENS, DIM, seed=9)
    errors, bits = [], []
    for make in LADDERS[ladder]:
        codec = make(seed=0)
        codec.fit(calibration(codec))
        errors.append(float((codec.decode(encode(codec, x)) - x).square().mean()))
        bits.append(codec.bits)
    assert bits == sorted(bits) and errors == sorted(errors, reverse=True)
