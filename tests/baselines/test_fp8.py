"""E4M3 has 3 mantissa bits: a relative error of 6 to 7e-4 on Gaussian data, whatever the scale of the data."""

from types import SimpleNamespace

import pytest
import torch

from kernels.attention import attend
from kvq.baselines.fp8 import FP8


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def fitted(granularity, x):
    return FP8(8, granularity=granularity, space="post").fit(SimpleNamespace(x=x[0]))


@pytest.mark.parametrize("granularity", ["tensor", "token_head"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_relative_error_on_gaussian_data(granularity, size):
    x = normal(1, 4, 1000, 128) * size
    codec = fitted(granularity, x)
    error = float((codec.decode(codec.encode(x)) - x).square().mean() / x.square().mean())
    assert 6.0e-4 < error < 7.2e-4


def test_one_outlier_token_costs_the_others_nothing():
    x = normal(1, 1, 1000, 64)
    x[0, 0, 0] *= 50  # powers of two above the rest: still normal numbers of the format
    codec = fitted("tensor", x)
    rest = x[:, :, 1:]
    assert (codec.decode(codec.encode(rest)) - rest).square().mean() / rest.square().mean() < 7.2e-4


def test_representable_values_are_exact():
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = grid[grid.isfinite()].view(1, 1, 1, -1)
    codec = fitted("tensor", x)
    assert float(codec.scale) == 1.0
    assert torch.equal(codec.decode(codec.encode(x)), x)


def test_tensor_scale_saturates_and_token_scale_does_not():
    x = normal(1, 1, 64, 32)
    tensor, token = fitted("tensor", x), fitted("token_head", x)
    top = x.abs().max()
    decoded = tensor.decode(tensor.encode(x * 100))
    assert torch.isclose(decoded.abs().max(), top) and torch.equal(decoded.sign(), x.sign())
    assert torch.isclose(token.decode(token.encode(x * 100)).abs().max(), top * 100, rtol=2e-3)


def test_bits_count_the_token_scale():
    x = normal(1, 2, 8, 128)
    assert fitted("tensor", x).bits == 8.0
    assert fitted("token_head", x).bits == 8.125


@pytest.mark.parametrize(
    "bits, options, says",
    [
        (4, {"granularity": "tensor", "space": "post"}, "only valid choice is 8"),
        (8, {"granularity": "row", "space": "post"}, "'tensor' or 'token_head'"),
        (8, {"granularity": "tensor", "space": "none"}, "'pre' or 'post'"),
    ],
)
def test_bad_options(bits, options, says):
    with pytest.raises(ValueError, match=says):
        FP8(bits, **options)


def test_token_scale_beyond_float16_is_refused():
    codec = fitted("token_head", normal(1, 1, 4, 8))
    with pytest.raises(ValueError, match="float16 range"):
        codec.encode(torch.full((1, 1, 1, 8), 1e9))


@pytest.mark.parametrize("granularity", ["tensor", "token_head"])
def test_attention_reads_what_the_codec_decodes(granularity):
    pytest.importorskip("triton")
    x = torch.randn(2, 2, 1, 45, 32, generator=torch.Generator().manual_seed(0)) + 0.7
    codec = FP8(8, granularity=granularity, space="post").fit(SimpleNamespace(x=x[0, 0]))
    fused = codec.fuse(codec)
    held = [fused.held(i) for i in (0, 1)]
    for pages, part in zip(held, x):
        codes = codec.encode(part)
        pages.append({name: leaf[:, :, :30] for name, leaf in codes.items()})
        pages.append({name: leaf[:, :, 30:] for name, leaf in codes.items()})
        assert all(torch.equal(pages.codes[name], codes[name]) for name in codes)
    query = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(9))
    ours, theirs = fused.attend(query, *held, 45, scale=0.2), attend(query, *(codec.decode(codec.encode(part)) for part in x), 0.2)
    assert (ours[0] - theirs[0]).norm() <= 2e-3 * theirs[0].norm()
