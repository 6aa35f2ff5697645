"""Packed codes come back unchanged and take exactly the bytes that the budget says."""

import pytest
import torch

from kernels.bitpack import pack, packed_bytes, unpack


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("n", [1, 5, 8, 63, 128])
def test_round_trip_and_size(bits, n):
    codes = torch.randint(0, 2**bits, (2, 3, n), generator=torch.Generator().manual_seed(n))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] == packed_bytes(n, bits) == -(-n * bits // 8)
    assert torch.equal(unpack(packed, bits, n), codes.int())


def test_layout_is_lsb_first():
    assert pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]), 3).tolist() == [0b11010001, 0b01011000, 0b00011111]
    assert pack(torch.tensor([1, 2]), 4).tolist() == [0x21]


@pytest.mark.parametrize("bits", [0, 17])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match="1 to 16"):
        pack(torch.zeros(4, dtype=torch.int32), bits)


def test_wrong_byte_count():
    with pytest.raises(ValueError, match="expected 3"):
        unpack(torch.zeros(2, dtype=torch.uint8), 3, 8)
