"""What every quantizer in conf/quant promises, found by glob: a new one is tested without a test file of its own."""

import functools
import math

import pytest
import torch
from safetensors.torch import load, save

from kvq.quantizer import Calibration, Quantizer, code_bytes, set_buffers
from tests import quants

HEADS, TOKENS, LEARN = 2, 64, 320
SHAPES = [128, 64]
LADDER = [0.5, 1, 2, 3, 4]
"""Bits tried where a quantizer leaves them open; the first three that it takes are tested."""


def normal(*shape, seed=0):
    """Correlated, of unequal scale, with outliers: the shape of real keys in miniature."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * torch.linspace(0.3, 3, shape[-1]) + 0.5 * torch.randn(*shape[:-1], 1, generator=generator)


def make(name, kind, bits=None, seed=0):
    return quants.maker(quants.load(name, bits), kind, seed)()


@functools.cache
def ladder(name: str, kind: str, dim: int) -> list:
    """The bits of LADDER that this quantizer takes at this shape; [None] where its YAML pins them."""
    if quants.pins_bits(name):
        return [None]
    valid = []
    for bits in LADDER:
        try:
            codec = make(name, kind, bits)
            getattr(codec, "check", lambda *_: None)(HEADS, dim)
            valid.append(bits)
        except ValueError as error:
            assert len(str(error)) > 20
    assert valid, f"{name} {kind} takes none of {LADDER} bits at head dimension {dim}"
    return valid[:3]


def calibration(codec, kind, dim, x=None):
    x = normal(HEADS, LEARN, dim, seed=1) if x is None else x
    group = codec.grad_group
    half = torch.arange(dim // 2)
    return Calibration(
        x=x, kind=kind, layer=1, seed=0, positions=torch.arange(LEARN) % 80, sample_length=80,
        queries=normal(2 * HEADS, LEARN, dim, seed=2) if kind == "key" else None,
        grads=normal(LEARN, HEADS * dim // group, seed=3).square() if group else None,
        pairs=torch.stack([half, half + dim // 2], 1) if kind == "key" else None,
        inv_freq=10000.0 ** (-half / (dim / 2)) if kind == "key" else None,
    )  # fmt: skip


@functools.cache
def fitted(name, kind, dim, bits, seed=0):
    codec = make(name, kind, bits, seed)
    assert codec.fit(calibration(codec, kind, dim)) is codec
    return codec


def encode(codec, x, state=None):
    return codec.encode(x, {} if state is None else state) if getattr(codec, "stateful", False) else codec.encode(x)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture(params=[(n, k, d) for n in quants.NAMES for k in ("key", "value") for d in SHAPES], ids=lambda p: "-".join(map(str, p)))
def case(request):
    name, kind, dim = request.param
    bits = ladder(name, kind, dim)
    return name, kind, dim, bits[0]


@pytest.fixture
def codec(case):
    return fitted(*case)


@pytest.fixture
def x(case, codec):
    return normal(2, HEADS, TOKENS - TOKENS % codec.block, case[2])


@pytest.mark.parametrize("name", quants.NAMES)
def test_the_yaml_has_the_five_keys(name):
    node = quants.load(name)
    assert list(node) == ["bits", "key", "value", "sink", "window"] and node["sink"] >= 0 and node["window"] >= 0
    text = (quants.ROOT / "conf" / "quant" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    for kind in ("key", "value"):
        assert node[kind]["_partial_"] is True


def test_it_follows_the_protocol(codec):
    assert isinstance(codec, Quantizer) and codec.block >= 1 and codec.space in ("pre", "post")
    assert codec.grad_group is None or codec.grad_group >= 1
    assert not list(codec.parameters()), "the only state of a quantizer is buffers"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shape_dtype_and_measured_bits(codec, x, dtype):
    codes = encode(codec, x.to(dtype))
    decoded = codec.decode(codes)
    assert decoded.shape == x.shape and decoded.dtype == torch.float32 and decoded.isfinite().all()
    assert codec.bits == 8 * code_bytes(codes) / x.numel()
    for name, leaf in codes.items():
        assert leaf.shape[0] == 2 and x.shape[2] % leaf.shape[2] == 0, f"{name} does not follow the law of codes: batch first, time third"


def test_chunks_equal_the_whole(codec, x):
    whole, state, parts = encode(codec, x), {}, []
    cuts = [0, 1, 1, 2, x.shape[2] // codec.block]
    for a, b in zip(cuts, cuts[1:]):
        parts.append(encode(codec, x[:, :, a * codec.block : b * codec.block], state))
    assert same({k: torch.cat([p[k] for p in parts], 2) for k in whole}, whole)
    first = {k: leaf[:, :, : leaf.shape[2] * codec.block // x.shape[2]] for k, leaf in whole.items()}
    torch.testing.assert_close(codec.decode(first), codec.decode(whole)[:, :, : codec.block], atol=1e-4, rtol=1e-4)


def test_batch_items_are_independent(codec, x):
    whole = encode(codec, torch.cat([x, 100 * x]))
    assert same({k: leaf[1:2] for k, leaf in whole.items()}, encode(codec, x[1:2]))


def test_memory_layout_does_not_matter(codec, x):
    assert same(encode(codec, x.transpose(1, 2).contiguous().transpose(1, 2)), encode(codec, x))


def test_the_input_is_left_alone(codec, x):
    kept = x.clone()
    encode(codec, x)
    assert torch.equal(kept, x)


def test_the_same_seed_gives_the_same_codes_and_the_global_generators_rest(case, codec, x):
    name, kind, dim, bits = case
    before = torch.random.get_rng_state()
    again = make(name, kind, bits)
    again.fit(calibration(again, kind, dim))
    assert same(encode(again, x), encode(codec, x))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_buffers_alone_restore_it(case, codec, x):
    name, kind, _, bits = case
    tensors = load(save({k: t.contiguous() for k, t in codec.named_buffers()} or {"empty": torch.zeros(1)}))
    tensors.pop("empty", None)
    twin = set_buffers(make(name, kind, bits), tensors)
    assert same(encode(twin, x), encode(codec, x)) and twin.bits == codec.bits
    assert torch.equal(twin.decode(encode(codec, x)), codec.decode(encode(codec, x)))


EXTREMES = {
    "zeros": lambda x: torch.zeros_like(x),
    "constant": lambda x: torch.full_like(x, 3.25),
    "one vector zero": lambda x: torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, 1:]], 2),
    "tiny": lambda x: x * 1e-7,
    "denormal": lambda x: x * 1e-40,
    "large": lambda x: x * 1e3,
    "one outlier": lambda x: torch.where(torch.arange(x.shape[-1]) == 3, x * 300, x),
}


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes_stay_finite(codec, x, extreme):
    y = EXTREMES[extreme](x)
    decoded = codec.decode(encode(codec, y))
    assert decoded.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(codec, x, bad):
    for where in ((0, 0, 0, 0), (1, 1, x.shape[2] - 1, x.shape[3] - 1)):
        y = x.clone()
        y[where] = bad
        with pytest.raises(ValueError, match="(?i)nan|inf|finite"):
            encode(codec, y)


def test_huge_values_are_coded_or_refused_but_never_garbage(codec, x):
    y = x * 1e30
    try:
        decoded = codec.decode(encode(codec, y))
    except ValueError as error:
        assert len(str(error)) > 20
    else:
        assert decoded.isfinite().all()


def test_an_unfitted_codec_refuses_or_needs_no_fit(case, codec, x):
    name, kind, _, bits = case
    unfitted = make(name, kind, bits)
    if getattr(unfitted, "depends_on", ("calib", "seed")):
        with pytest.raises((ValueError, RuntimeError), match="fit"):
            encode(unfitted, x)
        return
    try:
        codes = encode(unfitted, x)
    except (ValueError, RuntimeError) as error:
        assert "fit" in str(error)
    else:
        assert same(codes, encode(codec, x))


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("name", [n for n in quants.NAMES if not quants.pins_bits(n)])
def test_more_bits_give_less_error(name, kind):
    errors, stored = [], []
    valid = ladder(name, kind, 64)
    for bits in valid:
        codec = fitted(name, kind, 64, bits)
        x = normal(HEADS, LEARN, 64, seed=4)[None, :, : LEARN - LEARN % codec.block]
        errors.append(float((codec.decode(encode(codec, x)) - x).square().mean() / x.square().mean()))
        stored.append(codec.bits)
    assert len(valid) > 1 and stored == sorted(stored) and len(set(stored)) == len(stored)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.98 * errors[0], errors


@pytest.mark.parametrize("bits", [0.3, -1])
@pytest.mark.parametrize("name", [n for n in quants.NAMES if not quants.pins_bits(n)])
def test_impossible_bits_are_refused_with_a_sentence(name, bits):
    with pytest.raises(ValueError, match="bit") as caught:
        make(name, "key", bits)
    assert str(caught.value).endswith(".")
