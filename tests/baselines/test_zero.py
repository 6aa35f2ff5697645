"""The canary forgets everything but the number of tokens."""

from types import SimpleNamespace

import pytest
import torch

from kvq.baselines.zero import Zero


def test_decodes_to_zeros_at_one_byte_per_token():
    codec = Zero(0).fit(SimpleNamespace(x=torch.zeros(4, 3, 16)))
    codes = codec.encode(torch.ones(2, 4, 7, 16))
    assert codes["token"].numel() == 2 * 7 and codes["token"].dtype == torch.uint8
    assert codec.bits == 8 / (4 * 16)
    assert torch.equal(codec.decode(codes), torch.zeros(2, 4, 7, 16))


def test_bits_must_be_0():
    with pytest.raises(ValueError, match="0"):
        Zero(1)
