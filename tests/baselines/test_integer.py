"""Plain integers per token and head, against small arrays worked out by hand."""

from types import SimpleNamespace

import pytest
import torch

from kernels.attention import attend
from kvq.baselines.integer import Integer


def fitted(bits, symmetric, dim):
    return Integer(bits, symmetric=symmetric, space="post").fit(SimpleNamespace(x=torch.zeros(1, 2, dim)))


def test_asymmetric_by_hand():
    x = torch.tensor([-1.0, 0.0, 0.4, 2.0]).view(1, 1, 1, 4)  # min -1, scale 1: levels -1, 0, 1, 2
    codec = fitted(2, False, 4)
    codes = codec.encode(x)
    assert codes["codes"].item() == 0b11010100 and codes["minimum"].item() == -1 and codes["scale"].item() == 1
    assert codec.decode(codes).flatten().tolist() == [-1, 0, 0, 2]


def test_symmetric_by_hand():
    x = torch.tensor([-7.0, 0.0, 3.4, 6.6]).view(1, 1, 1, 4)  # scale 1: levels -7 ... 7
    codec = fitted(4, True, 4)
    assert codec.decode(codec.encode(x)).flatten().tolist() == [-7, 0, 3, 7]


@pytest.mark.parametrize("symmetric, side", [(False, 32), (True, 16)])
def test_bits(symmetric, side):
    assert fitted(4, symmetric, 128).bits == 4 + side / 128
    assert fitted(8, symmetric, 64).bits == 8 + side / 64


def test_error_stays_within_half_a_step():
    x = torch.randn(2, 1, 50, 64, generator=torch.Generator().manual_seed(0))
    codec = fitted(8, False, 64)
    codes = codec.encode(x)
    slack = 1e-3  # minimum and scale are float16
    assert ((codec.decode(codes) - x).abs() <= codes["scale"].float().unsqueeze(-1) * 0.5 + slack).all()


@pytest.mark.parametrize("bits", [1, 9, 3.5])
def test_unsupported_bits(bits):
    with pytest.raises(ValueError, match="2 to 8"):
        Integer(bits, symmetric=False, space="post")


def test_range_beyond_float16_is_refused():
    with pytest.raises(ValueError, match="float16 range"):
        fitted(4, False, 4).encode(torch.full((1, 1, 1, 4), -1e6))


@pytest.mark.parametrize("bits, symmetric", [(4, False), (4, True), (2, False), (8, True)])
def test_attention_reads_what_the_codec_decodes(bits, symmetric):
    pytest.importorskip("triton")
    x = torch.randn(2, 2, 1, 45, 32, generator=torch.Generator().manual_seed(bits)) + 0.7
    codec = fitted(bits, symmetric, 32)
    fused = codec.fuse(codec)
    held = [fused.held(i) for i in (0, 1)]
    for pages, part in zip(held, x):
        codes = codec.encode(part)
        pages.append(codes)
        assert all(torch.equal(pages.codes[name], codes[name]) for name in codes)
    query = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(9))
    ours, theirs = fused.attend(query, *held, 45, scale=0.2), attend(query, *(codec.decode(codec.encode(part)) for part in x), 0.2)
    assert (ours[0] - theirs[0]).norm() <= 2e-3 * theirs[0].norm()
