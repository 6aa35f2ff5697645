"""Prompts of heads of several segments: what :mod:`kernels.encode_segments_triton` reads, and its launch."""

import torch
from torch import Tensor

from kernels import backend
from kernels.encode_whole import TOKENS, addresses, book, matrices
from kernels.pages import Pages, Spec

POSITIONS, WIDE = 32, 8  # of a tile, and of one whose codes have more than 4 bits


class Segments:
    """The tables of one or two streams for tokens of a type, and the launch. The streams must be :func:`kernels.encode_whole.symmetric`."""

    def __init__(self, specs: tuple[Spec, ...], layouts: list, device: torch.device, dtype: torch.dtype):
        tiles, groups, heap, found = [], [], [], {}
        for stream, (spec, layout) in enumerate(zip(specs, layouts)):
            for head in range(spec.heads):
                tiles.append([])
                groups.append([])
                for row, seg in enumerate(spec.segments):
                    if seg.head != head:
                        continue
                    at_book = found.setdefault((stream, seg.book, seg.width), len(heap))
                    if at_book == len(heap):
                        heap += book(spec.levels[seg.book : seg.book + 2**seg.width])
                    begin = len(tiles[-1])
                    most = POSITIONS if seg.width <= 4 else WIDE
                    for at in range(0, seg.size, most):
                        tiles[-1].append([seg.width, layout.bases[row] + at, seg.size, at_book, min(most, seg.size - at), seg.start + at, 0, 0])
                    groups[-1].append([begin, len(tiles[-1]), row, seg.size])
        integers = lambda lists: torch.tensor([x + [[0] * len(x[0])] * (max(map(len, lists)) - len(x)) for x in lists], dtype=torch.int32, device=device)  # noqa: E731
        self.specs, self.tiles, self.groups, self.heap = specs, integers(tiles), integers(groups), torch.tensor(heap, device=device)
        rotation, shift = matrices(specs, dtype, device)  # the last tile may be narrower than it is read
        self.rotation, self.shift = torch.nn.functional.pad(rotation, (0, 0, 0, POSITIONS)), torch.nn.functional.pad(shift, (0, POSITIONS))

    def __call__(self, held: list[Pages], xs: list[Tensor], starts: Tensor, counts: Tensor) -> None:
        """Code xs, [B, H, T, D] for each stream with D contiguous, into pages that have room. starts, counts [B] int32 on the device."""
        from kernels import encode_segments_triton as twin

        (k, v), (kx, vx), (ks, vs) = (held * 2)[:2], (xs * 2)[:2], (self.specs * 2)[:2]
        batch, _, tokens, dim = kx.shape
        steps = -(-tokens // TOKENS) + 1  # tokens that begin inside a page may end one step later
        twin.encode_segments[steps, ks.heads * len(xs), batch](
            kx, vx, k.words, k.sides, v.words, v.sides, self.rotation, self.shift, self.tiles, self.groups, self.heap,
            starts, counts, *addresses(k, v, kx, vx, counts), self.rotation.stride(0),
            ks.heads, self.tiles.shape[1], self.groups.shape[1], dim, k.strides()[2], v.strides()[2], ks.log8, vs.log8,
            ks.gain == "least_squares", vs.gain == "least_squares", any(s.mean is not None for s in self.specs), k.table is not None, backend.ASM,
            num_warps=4, num_stages=1,
        )  # fmt: skip
