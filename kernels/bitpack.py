"""Dense packing of integer codes: n codes of b bits take ceil(n*b/8) bytes, least significant bit first.

The published Block-GTQ code stores 3-bit codes as nibbles; here 3 bits are 3 bits, so stored bytes follow the budget.
"""

import torch
from torch import Tensor


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that n codes of `bits` bits occupy after :func:`pack`."""
    return (n * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integers [..., n] in [0, 2**bits) into uint8 [..., ceil(n*bits/8)].

    Code i occupies stream bits [i*bits, (i+1)*bits); bit k of the stream is bit k % 8 of byte k // 8.
    Raises ValueError if bits is not in 1..16; codes out of range are a caller's bug and are masked, not checked.
    """
    _check(bits)
    if bits == 8:
        return codes.to(torch.uint8)
    n = codes.shape[-1]
    if 8 % bits == 0:
        per = 8 // bits
        padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -n % per))
        groups = padded.unflatten(-1, (-1, per)) & (2**bits - 1)
        shifts = torch.arange(per, device=codes.device, dtype=torch.uint8) * bits
        return (groups << shifts).sum(-1, dtype=torch.uint8)
    shifts = torch.arange(bits, device=codes.device, dtype=torch.int32)
    stream = ((codes.to(torch.int32).unsqueeze(-1) >> shifts) & 1).to(torch.uint8).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (stream << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Invert :func:`pack`: uint8 [..., ceil(n*bits/8)] to int32 [..., n]. Raises ValueError on a wrong byte count."""
    _check(bits)
    if packed.shape[-1] != packed_bytes(n, bits):
        raise ValueError(f"{packed.shape[-1]} bytes cannot hold {n} codes of {bits} bits; expected {packed_bytes(n, bits)}.")
    if bits == 8:
        return packed.to(torch.int32)
    if 8 % bits == 0:
        shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8) * bits
        return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)[..., :n].to(torch.int32)
    stream = (packed.unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    stream = stream.flatten(-2)[..., : n * bits].unflatten(-1, (n, bits)).to(torch.int32)
    return (stream << torch.arange(bits, device=packed.device, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def _check(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be an integer from 1 to 16, got {bits}.")
