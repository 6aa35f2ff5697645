"""Rows whose positions have different code widths, packed as one dense bit stream without padding between them.

The stream of a row is a sequence of bit planes: bit 0 of every position, then bit 1 of every position wider than one bit, and
so on, each in position order. All rows of a tensor may have different widths as long as the widths have the same sum, so the
bytes of a row are ceil(sum / 8) for every head. The public Block-GTQ cache stores nibbles and whole bytes instead, padded to
the worst head of the model.
"""

import torch
from torch import Tensor, nn


class MixedStream:
    """Packs codes [B, H, T, D] with widths [H, D], 1 to 8 bits each and of equal sum in every head."""

    def __init__(self, widths: Tensor):
        total = widths.sum(1)
        if (total != total[0]).any():
            raise ValueError(f"Every head must have the same number of code bits, got {total.tolist()}.")
        self.row_bits = int(total[0])
        self.row_bytes = (self.row_bits + 7) // 8
        heads, dim = widths.shape
        planes = int(widths.max())
        used = torch.arange(planes, device=widths.device)[:, None] < widths[:, None]  # [H, planes, D]
        slot = used.flatten(1).cumsum(1).sub(1).view_as(used)
        # Positions without a bit in this plane read the zero appended after the stream.
        self.slots = slot.masked_fill(~used, 8 * self.row_bytes).unbind(1)
        source = used.flatten(1).nonzero()[:, 1].view(heads, self.row_bits)
        self.position = source % dim
        self.plane = (source // dim).to(torch.uint8)

    def pack(self, codes: Tensor) -> Tensor:
        """Codes [B, H, T, D] of any integer type to uint8 [B, H, T, row_bytes]; codes too large for their width are masked."""
        stream = _take(codes.to(torch.uint8), self.position) >> self.plane[:, None] & 1
        stream = nn.functional.pad(stream, (0, 8 * self.row_bytes - self.row_bits)).unflatten(-1, (-1, 8))
        return (stream << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)

    def unpack(self, packed: Tensor) -> Tensor:
        """Invert :meth:`pack`: int32 [B, H, T, D]. Raises ValueError on a wrong byte count."""
        if packed.shape[-1] != self.row_bytes:
            raise ValueError(f"A row of {self.row_bits} bits has {self.row_bytes} bytes, got {packed.shape[-1]}.")
        stream = packed.unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1
        stream = nn.functional.pad(stream.flatten(-2), (0, 1))
        codes = sum(_take(stream, slots) << plane for plane, slots in enumerate(self.slots))
        return codes.to(torch.int32)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, T, n] at index [H, m], giving [B, H, T, m]."""
    return x.gather(-1, index[:, None].expand(*x.shape[:-1], index.shape[-1]))
