"""The codecs as kernels serve them: equal codes from the one-launch encoder, equal attention from packed pages, and through a whole model."""

import pytest
import torch

from blockgtq import BlockGTQ, TurboQuantMSE
from kernels import backend
from kernels.attention import attend
from kernels.encode import Encoder, encodable, symbols
from kernels.paged import fuse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not backend._installed(), reason="Triton is not installed here")
PAIRS = {
    "tq": lambda: (TurboQuantMSE(3), TurboQuantMSE(3)),
    "tq_hadamard": lambda: (TurboQuantMSE(4, rotation="hadamard", codebook="exact"), TurboQuantMSE(1, rotation="none", gain="least_squares")),
    "gtq": lambda: (BlockGTQ(3), TurboQuantMSE(2)),
    "gtq_plus": lambda: (BlockGTQ(2.5, center=True, codebook="exact", gain="least_squares", norm_dtype="log8"), TurboQuantMSE(2, center=True, norm_dtype="log8")),
    "gtq_wide": lambda: (BlockGTQ(5, norm_dtype="float32", score="qk_mse"), TurboQuantMSE(4)),
}


@pytest.fixture(params=PAIRS)
def pair(request, calibrate):
    codecs = [c.fit(calibrate(kind, dim=32, spread=1.5)) for c, kind in zip(PAIRS[request.param](), ("key", "value"))]
    return [c.to(DEVICE) for c in codecs]


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_encoder_gives_the_codes_of_the_codecs(pair, dtype):
    fused = fuse(*pair)
    ours, theirs = ([fused.held(i) for i in (0, 1)] for _ in range(2))
    assert all(encodable(pages.spec) for pages in ours)
    encoder, start = Encoder(*fused.specs), 0
    x = [(draw(seed, 2, 2, 40, 32) * torch.linspace(0.2, 4, 32, device=DEVICE)).to(dtype) for seed in (1, 2)]
    x[0][0, 0, 5] = 0
    for size in (1, 33, 1, 0, 5):
        parts = [part[:, :, start : start + size] for part in x]
        assert encoder.take(ours, parts)
        for pages, codec, part in zip(theirs, pair, parts):
            pages.append(codec.encode(part))
        start += size
    for a, b in zip(ours, theirs):
        assert a.tokens == b.tokens == 40
        (codes, sides), (expected, gains) = a.symbols(), b.symbols()
        # A value within float32 rounding of a threshold may take either neighbour; at 5,000 values that is rarely even one.
        assert (codes != expected).sum() <= 2 and (codes - expected).abs().max() <= 1
        same = (codes == expected).all(-1).all()
        torch.testing.assert_close(sides.float(), gains.float(), rtol=2e-3, atol=1.0 if a.spec.log8 else 1e-3)
        assert not same or a.spec.stored == torch.float32 or (sides != gains).float().mean() < 0.02


def test_the_definition_in_torch_is_the_codecs_arithmetic(pair):
    for codec in pair:
        x, spec = draw(8, 2, 2, 50, 32).half(), codec.paged()
        x[0, 1, 7] = 0
        for ours, theirs in zip(symbols(spec, x), spec.symbols(codec.encode(x))):
            assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what the interpreter says of such values
def test_what_a_codec_refuses_is_left_to_it(pair):
    """Nothing is held, the codec says why, and pages go on as if nothing had happened; nor is a token of another shape taken."""
    fused, whole = fuse(*pair), draw(0, 1, 2, 40, 32)
    for index, codec in enumerate(pair):
        pages, far = fused.held(index), whole.clone()
        encoder = Encoder(pages.spec)
        assert encoder.take([pages], [whole]) and not encoder.take([pages], [whole[..., :16]])
        before = [part.clone() for part in pages.symbols()]
        far[0, 1, 2] *= 1e6
        for bad in (whole.index_fill(3, torch.tensor([7], device=DEVICE), torch.nan), whole.index_fill(2, torch.tensor([3], device=DEVICE), torch.inf), far):
            if bad is far and pages.spec.stored == torch.float32:
                continue
            assert not encoder.take([pages], [bad]) and pages.tokens == 40
            with pytest.raises(ValueError, match="Cannot encode: " + ("gain .* exceeds" if bad is far else "value (nan|inf)")):
                codec.encode(bad)
        assert all(torch.equal(part, old) for part, old in zip(pages.symbols(), before))
        assert encoder.take([pages], [whole]) and pages.tokens == 80


def test_attention_reads_what_the_codecs_decode(pair):
    fused = fuse(*pair)
    held, x = [fused.held(i) for i in (0, 1)], [draw(seed, 2, 2, 77, 32) for seed in (3, 4)]
    decoded = []
    for pages, codec, part in zip(held, pair, x):
        codes = codec.encode(part)
        pages.append(codes)
        assert all(torch.equal(pages.codes[name], codes[name]) for name in codes), "pages hold the codec's codes, bit for bit"
        decoded.append(codec.decode(codes))
    query, first = draw(5, 2, 4, 32).half(), torch.tensor([0, 9], device=DEVICE)
    output, lse = fused.attend(query, *held, 70, scale=0.125, first=first)
    expected = attend(query, *(d[:, :, :70] for d in decoded), 0.125, first)
    assert (output - expected[0]).norm() <= 1e-2 * expected[0].norm()
    torch.testing.assert_close(lse, expected[1], atol=1e-2, rtol=1e-3)


def test_pairs_without_a_kernel(calibrate):
    key = TurboQuantMSE(3).fit(calibrate("key", dim=24))
    value = TurboQuantMSE(5).fit(calibrate("value", dim=32))
    assert fuse(key, TurboQuantMSE(3).fit(calibrate("value", dim=24))) is None, "24 channels are no whole tiles"
    assert fuse(TurboQuantMSE(3).fit(calibrate("key", dim=32)), torch.nn.Identity()) is None
    assert fuse(TurboQuantMSE(3).fit(calibrate("key", dim=32)), value) is not None


def test_keys_before_rope_have_no_kernel(calibrate):
    key = TurboQuantMSE(3, space="pre").fit(calibrate("key", dim=32))
    assert fuse(key, TurboQuantMSE(3).fit(calibrate("value", dim=32))) is None
