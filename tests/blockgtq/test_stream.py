"""Mixed-width rows come back unchanged and take exactly the bits of their widths."""

import pytest
import torch

from blockgtq.stream import MixedStream
from kernels.bitpack import pack


@pytest.mark.parametrize("seed", range(4))
def test_round_trip_with_different_heads(seed):
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(1, 9, (1, 23), generator=generator)
    widths = torch.stack([widths[0, torch.randperm(23, generator=generator)] for _ in range(3)])
    codes = torch.randint(0, 256, (2, 3, 5, 23), generator=generator) % 2 ** widths[:, None]
    stream = MixedStream(widths)
    packed = stream.pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, 5, -(-int(widths[0].sum()) // 8))
    assert torch.equal(stream.unpack(packed), codes.int())


def test_one_bit_equals_plain_packing():
    codes = torch.randint(0, 2, (1, 2, 4, 19), generator=torch.Generator().manual_seed(0))
    assert torch.equal(MixedStream(torch.ones(2, 19, dtype=torch.int64)).pack(codes), pack(codes, 1))


def test_bit_planes_in_position_order():
    packed = MixedStream(torch.tensor([[1, 3, 2]])).pack(torch.tensor([1, 0b110, 0b01]).view(1, 1, 1, 3))
    assert packed.flatten().tolist() == [0b101 | 0b01 << 3 | 0b1 << 5]


def test_unequal_heads_and_wrong_bytes():
    with pytest.raises(ValueError, match="same number of code bits"):
        MixedStream(torch.tensor([[1, 2], [2, 2]]))
    with pytest.raises(ValueError, match="1 bytes"):
        MixedStream(torch.tensor([[1, 2]])).unpack(torch.zeros(1, 1, 1, 2, dtype=torch.uint8))
