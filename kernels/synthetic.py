"""Random scalar caches of any shape, without a model or a codec: what kernel tests and kernel timings read."""

import torch

from kernels.pages import PAGE, Layout, Pages, Segment, Spec, room
from kernels.rotate import haar
from kernels.scalar import gaussian_levels


def draw_widths(heads: int, blocks: int, bits: float, spread: float, generator: torch.Generator, tile: int = 1) -> list[list[int]]:
    """Widths of RoPE blocks [H][L], 1 to 8, each head spending exactly int(blocks / tile * bits) * tile: greedy over log-normal energies.

    spread: standard deviation of half the log2 energies; 0.75 gives the histograms of arXiv 2606.24033, Table 8. tile: blocks of like energy
    that share a width.
    """
    widths = []
    for _ in range(heads):
        energy = 2 ** (2 * spread * torch.randn(blocks, generator=generator))
        order = energy.argsort(descending=True)
        energy = energy[order].view(-1, tile).sum(1)
        width = torch.ones(len(energy), dtype=torch.long)
        for _ in range(int(len(energy) * bits) - len(energy)):
            gain = energy * 4.0**-width
            gain[width == 8] = -1
            width[gain.argmax()] += 1
        widths.append(torch.empty_like(order).scatter_(0, order, width.repeat_interleave(tile)).tolist())
    return widths


def spec(heads: int, dim: int, widths: list[list[int]] | int, *, rotated=True, centred=False, log8=False, offset=False, integers=False, device="cpu") -> Spec:
    """A specification with levels of N(0, 1), or 0, 1, ...; widths: one for all channels, or one per RoPE block, grouped and turned as Block-GTQ does."""
    segments, levels, books = [], [], {}
    for head in range(heads):
        row = [widths] * (dim // 2) if isinstance(widths, int) else widths[head]
        start = 0
        for width in sorted(set(row)):
            if width not in books:
                books[width] = sum(map(len, levels))
                levels.append(torch.arange(2**width).float() if integers else gaussian_levels(width).float())
            size = 2 * row.count(width)
            segments.append(Segment(head, start, size, width, books[width]))
            start += size
    turns = [[haar(seg.size, head) for seg in segments if seg.head == head] for head in range(heads)]
    rotation = torch.stack([torch.block_diag(*parts) for parts in turns]) if rotated else None
    mean = torch.linspace(-1, 1, heads * dim).view(heads, dim) if centred else None
    move = lambda x: None if x is None else x.to(device)  # noqa: E731
    numbers = tuple(segments), move(torch.cat(levels)), move(rotation), move(mean), None, None, torch.uint8 if log8 else torch.float16
    return Spec(heads, dim, *numbers, log8, offset, gain=None if offset or integers else "unit_norm")


def pages(spec: Spec, batch: int, tokens: int, generator: torch.Generator | None = None) -> Pages:
    """Pages of random bits; with a CPU generator reproducible on any device, without one drawn where they lie."""
    held, count, device = Pages(spec, Layout(spec)), -(-tokens // PAGE), spec.levels.device
    rows = len(spec.segments) * (2 if spec.offset else 1)
    where = device if generator is None else "cpu"
    shape = batch, spec.heads, count, held.layout.words
    held.words = room(*shape, device=device)
    held.words.copy_(torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, device=where, dtype=torch.int32))
    side = batch, count, rows, PAGE
    if spec.log8:
        held.sides = torch.randint(100, 150, side, generator=generator, device=where, dtype=torch.uint8).to(device)
    else:
        held.sides = (0.5 + torch.rand(side, generator=generator, device=where)).to(device, torch.float16)
    held.tokens = tokens
    return held


def repeat(held: Pages, tokens: int) -> None:
    """Let `held`, which ends with a whole page, hold `tokens` tokens: its pages over and over, and one page to spare."""
    begun, count = held.tokens // PAGE, -(-tokens // PAGE)
    if held.tokens % PAGE:
        raise ValueError(f"{held.tokens} tokens do not fill their last page of {PAGE}; nothing was repeated.")
    held.reserve(count + 1, held.words.shape[:2], held.sides[:, 0, :, :0])
    for start in range(begun, count, begun):
        here = min(begun, count - start)
        held.words[:, :, start : start + here] = held.words[:, :, :here]
        held.sides[:, start : start + here] = held.sides[:, :here]
    held.tokens = tokens
