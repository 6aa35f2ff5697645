"""Prompts of heads that are one segment each: which codecs :mod:`kernels.encode_whole_triton` serves, what it reads, and its launch."""

import torch
from torch import Tensor

from kernels import backend
from kernels.pages import Pages, Spec

TYPES = (torch.float16, torch.bfloat16)
TOKENS = 128  # of a program's step
_MIDDLE = 1e-6  # levels this symmetric about zero, relative to the largest, count as symmetric


def served(specs: tuple[Spec, ...]) -> bool:
    """Whether one launch codes prompts of these streams: every head one segment, all of one width of 1 to 4 bits, symmetric levels, at most 128 channels."""
    widths = {seg.width for spec in specs for seg in spec.segments}
    return symmetric(specs) and len(widths) == 1 and max(widths) <= 4 and all(len(spec.segments) == spec.heads for spec in specs)


def symmetric(specs: tuple[Spec, ...]) -> bool:
    """Whether the levels of all segments are symmetric about zero, and heads have at most 128 channels: what coding by magnitude needs."""
    books = {(i, seg.book, seg.width) for i, spec in enumerate(specs) for seg in spec.segments}
    found = (specs[i].levels[book : book + 2**width].double() for i, book, width in books)
    return max(spec.dim for spec in specs) <= 128 and all(bool((x + x.flip(0)).abs().amax() <= _MIDDLE * x.abs().amax()) for x in found)


def matrices(specs: tuple[Spec, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rotations of all heads, by stored position, as two matrices of `dtype` that add up to them [2, heads, D, D], and the rotated means [heads, D] float32.

    What they leave is 2**-25 of an entry of a float16 matrix and 2**-18 of a bfloat16 entry itself: at most 4e-6 of a vector's norm.
    """
    dim = specs[0].dim
    eye = torch.eye(dim, device=device)[None]
    rotation = torch.cat([(eye if s.rotation is None else s.rotation.to(device)).expand(s.heads, -1, -1) for s in specs]).double()
    mean = torch.cat([torch.zeros(s.heads, dim, device=device) if s.mean is None else s.mean.to(device) for s in specs]).double()
    high = rotation.to(dtype)
    return torch.stack([high, (rotation - high.double()).to(dtype)]), (rotation @ mean.unsqueeze(-1)).squeeze(-1).float()


def addresses(key: Pages, value: Pages, keys: Tensor, values: Tensor, any_tensor: Tensor) -> tuple:
    """What every encoding kernel is told of where tokens lie and where their codes go: the table of pages (or any tensor), then strides."""
    pages = [stride for held in (key, value) for stride in (*held.strides()[:2], held.strides()[3], held.sides.shape[-2])]
    table = (any_tensor, 0) if key.table is None else (key.table, key.table.stride(0))
    return table[0], *keys.stride()[:3], *values.stride()[:3], *pages, table[1]


class Whole:
    """The tables of one or two streams for tokens of a type, and the launch."""

    def __init__(self, specs: tuple[Spec, ...], device: torch.device, dtype: torch.dtype):
        self.specs, self.width = specs, specs[0].segments[0].width
        heads = [(spec, seg, row) for spec in specs for row, seg in sorted(enumerate(spec.segments), key=lambda pair: pair[1].head)]
        self.rows = torch.tensor([row for _, _, row in heads], dtype=torch.int32, device=device)
        books = [book(spec.levels[seg.book : seg.book + 2**seg.width]) for spec, seg, _ in heads]
        self.books = torch.tensor([numbers + [0.0] * (16 - len(numbers)) for numbers in books], device=device)
        self.rotation, self.shift = matrices(specs, dtype, device)
        self.centred = any(spec.mean is not None for spec in specs)

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
            starts, counts, *addresses(k, v, kx, vx, counts), self.rotation.stride(0),
            ks.heads, dim, k.strides()[2], v.strides()[2], self.width, ks.log8, vs.log8, ks.gain == "least_squares", vs.gain == "least_squares",
            self.centred, k.table is not None, backend.ASM, num_warps=4, num_stages=1,
        )  # fmt: skip


def book(levels: Tensor) -> list[float]:
    """Thresholds of the magnitude by bisection, node n's children at 2 n and 2 n + 1, then its levels; in their lowest bits, to 4 bits of width, a code.

    It is the code of the negative level, that of the positive one its complement; bits 0 and 1 lie at 0 and 1, 2 and 3 at 4 and 5, the last of an odd
    width at 4. A level moves by 51 of its 2**23 units at most, which a gain of 11 bits does not show.
    """
    width = len(levels).bit_length() - 1
    upper = levels.cpu()[len(levels) // 2 :]
    count, nodes, span = len(upper), [0.0], len(upper)
    while span > 1:
        nodes += [float(upper[at - 1].double() + upper[at].double()) / 2 for at in range(span // 2, count, span)]
        span //= 2
    code = count - 1 - torch.arange(count, dtype=torch.int32)
    marked = upper.float().view(torch.int32) & ~51 | code & 3 | (code >> 2 & 3) << 4
    return nodes + (marked.view(torch.float32) if width <= 4 else upper).tolist()
