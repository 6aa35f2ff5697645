"""The reference keeps 16-bit tensors bit for bit and refuses what 16 bits cannot hold."""

from types import SimpleNamespace

import pytest
import torch

from kvq.baselines.fp16 import FP16


@pytest.fixture
def codec():
    return FP16(16).fit(SimpleNamespace(x=torch.zeros(1, 4, 8)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_tensors_are_exact(codec, dtype):
    x = (torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    codes = codec.encode(x)
    assert codes["x"].dtype == dtype
    assert torch.equal(codec.decode(codes), x.float())


def test_bfloat16_beyond_float16_is_kept(codec):
    x = torch.full((1, 1, 1, 8), 1e30, dtype=torch.bfloat16)
    assert torch.equal(codec.decode(codec.encode(x)), x.float())


def test_float32_overflow_is_refused_not_clamped(codec):
    with pytest.raises(ValueError, match="float16 range"):
        codec.encode(torch.full((1, 1, 1, 8), 7e4))


def test_codes_do_not_alias_the_input(codec):
    x = torch.ones(1, 1, 2, 8, dtype=torch.float16)
    codes = codec.encode(x)
    x.zero_()
    assert codec.decode(codes).eq(1).all()


def test_bits_must_be_16():
    with pytest.raises(ValueError, match="16"):
        FP16(8)
