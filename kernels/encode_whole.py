"""Prompts of heads that are one segment each: which codecs :mod:`kernels.encode_whole_triton` serves, what it reads, and its launch."""

import torch
from torch import Tensor

from kernels import backend
from kernels.pages import Pages, Spec

TYPES = (torch.float16, torch.bfloat16)
AHEAD = True  # ask for the next step's tokens while this one is coded
TOKENS = 128  # of a program's step
_MIDDLE = 1e-6  # levels this symmetric about zero, relative to the largest, count as symmetric


def served(specs: tuple[Spec, ...]) -> bool:
    """Whether one launch codes prompts of these streams: every head one segment, one width of 1 to 4 bits, symmetric levels, 16 to 128 channels."""
    segments = [seg for spec in specs for seg in spec.segments]
    if any(len(spec.segments) != spec.heads or spec.dim > 128 for spec in specs) or len({seg.width for seg in segments}) > 1 or segments[0].width > 4:
        return False
    books = torch.stack([spec.levels[seg.book : seg.book + 2**seg.width] for spec in specs for seg in spec.segments]).double()
    return bool(((books + books.flip(1)).abs().amax(1) <= _MIDDLE * books.abs().amax(1)).all())


class Whole:
    """The tables of one or two streams for tokens of a type, and the launch."""

    def __init__(self, specs: tuple[Spec, ...], device: torch.device, dtype: torch.dtype):
        self.specs, self.width = specs, specs[0].segments[0].width
        heads = [(spec, seg, row) for spec in specs for row, seg in sorted(enumerate(spec.segments), key=lambda pair: pair[1].head)]
        self.rows = torch.tensor([row for _, _, row in heads], dtype=torch.int32, device=device)
        self.books = torch.stack([_book(spec.levels[seg.book : seg.book + 2**seg.width].cpu()) for spec, seg, _ in heads]).to(device)
        dim = specs[0].dim
        eye = torch.eye(dim, device=device)[None]
        rest = torch.cat([(eye if s.rotation is None else s.rotation.to(device)).expand(s.heads, -1, -1) for s in specs]).double()
        mean = torch.cat([torch.zeros(s.heads, dim, device=device) if s.mean is None else s.mean.to(device) for s in specs]).double()
        self.shift = (rest @ mean.unsqueeze(-1)).squeeze(-1).float()
        self.centred = any(s.mean is not None for s in specs)
        parts = []
        for _ in range(2):  # leaves 2**-25 of a float16 rotation, 2**-18 of a bfloat16 entry: at most 4e-6 of a vector's norm
            parts.append(rest.to(dtype))
            rest = rest - parts[-1].double()
        self.rotation = torch.stack(parts)

    def __call__(self, held: list[Pages], xs: list[Tensor], starts: Tensor, counts: Tensor) -> None:
        """Code xs, [B, H, T, D] for each stream with D contiguous, into pages that have room. starts, counts [B] int32 on the device."""
        from kernels import encode_whole_triton as twin

        (k, v), (kx, vx), (ks, vs) = (held * 2)[:2], (xs * 2)[:2], (self.specs * 2)[:2]
        batch, _, tokens, dim = kx.shape
        heads = ks.heads * len(xs)
        steps = -(-tokens // TOKENS) + 1  # tokens that begin inside a page may end one step later
        splits = max(1, min(steps, backend.programs(kx.device) // backend.WARPS * 2 // (heads * batch)))
        twin.encode_whole[splits, heads, batch](
            kx, vx, k.words, k.sides, v.words, v.sides, self.rotation, self.shift, self.rows, self.books,
            starts, counts, counts if k.table is None else k.table, *kx.stride()[:3], *vx.stride()[:3], *k.strides()[:2], k.strides()[3], k.sides.shape[-2],
            *v.strides()[:2], v.strides()[3], v.sides.shape[-2], 0 if k.table is None else k.table.stride(0), self.rotation.stride(0),
            ks.heads, dim, k.strides()[2], v.strides()[2], self.width, ks.log8, vs.log8, ks.gain == "least_squares", vs.gain == "least_squares",
            self.centred, k.table is not None, backend.ASM, AHEAD, num_warps=4, num_stages=1,
        )  # fmt: skip


def _book(levels: Tensor) -> Tensor:
    """float32 [16]: thresholds of the magnitude by bisection from index 1 on, then its levels; in a level's lowest bits the code of its negative, spread.

    Bits 0 and 1 of a code lie at 0 and 1, 2 and 3 at 4 and 5; of an odd width the last at 4. The code of the positive level is the complement.
    A level moves by 51 of its 2**23 units at most, which a gain of 11 bits does not show.
    """
    width = len(levels).bit_length() - 1
    upper = levels.double()[len(levels) // 2 :]
    count, nodes, span = len(upper), [0.0], len(upper)
    while span > 1:
        nodes += [float(upper[at - 1] + upper[at]) / 2 for at in range(span // 2, count, span)]
        span //= 2
    code = count - 1 - torch.arange(count, dtype=torch.int32)
    spread = code & 3 | (code >> 2 & 3) << 4
    marked = (upper.float().view(torch.int32) & ~51 | spread).view(torch.float32)
    book = torch.zeros(16)
    book[:count], book[count : 2 * count] = torch.tensor(nodes[:count]), marked
    return book if width > 1 else torch.cat([torch.zeros(1), marked, torch.zeros(14)])
