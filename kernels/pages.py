"""Codes in the order that kernels read: pages of 32 tokens, one channel's bits of many tokens side by side in a 32-bit word.

A kernel that turns codes into levels works on 8 codes per instruction if they share a table. Channels do not: their widths differ.
Tokens do. So a word holds one channel, and a channel of b bits takes exactly b words per page: any mixture of widths is dense.

Bits (2a, 2a + 1) of the code of token 8 s + j of a page are bits 4 j + 2 (s % 2) of word s // 2 of plane a; the last bit of an odd width is
bit 4 j + s of one more word. Then `(word >> shift) & 0x33333333` is 8 codes in 8 nibbles, j = 0..7, for any s.
A page of one head is its segments in order; a segment of n channels is planes [b // 2, 2, n], then [1, n] if b is odd.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import backend

PAGE = 32
TILE = 16  # stored positions in one step of a tensor core
_BATCH = 64  # pages packed at a time: the expansion of a page is 32 times its codes


class Segment(NamedTuple):
    """Stored positions [start, start + size) of a head: `width` bits each, levels from `book` on, one gain per token."""

    head: int
    start: int
    size: int
    width: int
    book: int


@dataclass(frozen=True)
class Spec:
    """How one codec's codes become numbers: x = (gain * levels[code] + offset) @ rotation + mean, gain and offset per token and segment.

    levels [n] float32; rotation [H or 1, D, D] float32, rows: stored positions, or None; mean [H, D] float32 or None.
    stored: type of the sides. log8: gains are bytes that mean 2**((c - 128) / 8), 0 for 0. offset: `sides` carries gains, then offsets; bare: nothing, gains are 1.
    channels: instead a gain and an offset per channel and page of 32 tokens: row h D / 32 + r of the sides, at 32 p + c, is the gain of channel 32 r + c
    of head h in page p; the offsets follow in as many rows. T is then a multiple of 32.
    symbols(codes) gives (integer codes [B, H, T, D] by stored position, sides [B, segments (times 2 with offset), T]); restore undoes it.
    """

    heads: int
    dim: int
    segments: tuple[Segment, ...]
    levels: Tensor
    rotation: Tensor | None
    mean: Tensor | None
    symbols: Callable
    restore: Callable
    stored: torch.dtype = torch.float16
    log8: bool = False
    offset: bool = False
    bare: bool = False
    channels: bool = False
    gain: str | None = None  # what the codec stores as gain, where `kernels.encode` can compute it: unit_norm or least_squares; no channel is then in two segments


class Layout:
    """Where every bit of a page is, for all heads of one stream. Raises ValueError if heads differ in their number of bits."""

    def __init__(self, spec: Spec):
        position, shift, mask, half, bases, used = [], [], [], [], [], [0] * spec.heads
        for seg in spec.segments:
            bases.append(used[seg.head])
            used[seg.head] += seg.size * seg.width
        if len(set(used)) != 1:
            raise ValueError(f"Every head must have the same number of code bits, got {used}.")
        self.words, self.bases = used[0], bases
        self.tiles = _tiles(spec, bases)
        for head in range(spec.heads):
            for seg in (s for s in spec.segments if s.head == head):
                channels = range(seg.start, seg.start + seg.size)
                rows = [(2 * a, 3, hp) for a in range(seg.width // 2) for hp in (0, 1)] + [(seg.width - 1, 1, -1)] * (seg.width % 2)
                for low, bits, hp in rows:
                    position += channels
                    shift += [low] * seg.size
                    mask += [bits] * seg.size
                    half += [hp] * seg.size
        device = spec.levels.device
        table = [torch.tensor(x, device=device).view(spec.heads, 1, 1, self.words) for x in (position, shift, mask, half)]
        self.position, self.shift, self.mask, half = table
        token = torch.arange(PAGE, device=device).view(PAGE, 1)
        j, s = token % 8, token // 8
        self.at = torch.where(half < 0, 4 * j + s, 4 * j + 2 * (s % 2))  # [H, 1, 32, W]
        self.mask = torch.where((half < 0) | (half == s // 2), self.mask, 0)
        self.dim = spec.dim

    def pack(self, codes: Tensor) -> Tensor:
        """Integer codes [B, H, T, D] to int32 words [B, H, ceil(T / 32), W]; tokens that are missing in the last page are zero."""
        pages = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[2] % PAGE)).unflatten(2, (-1, PAGE)).long()
        return torch.cat([self._pack(part) for part in pages.split(_BATCH, 2)], 2) if pages.shape[2] else pages.new_empty(*pages.shape[:3], self.words).int()

    def _pack(self, pages: Tensor) -> Tensor:
        return self._bits(pages, self.mask, self.at).sum(3).to(torch.int32)

    def _bits(self, codes: Tensor, mask: Tensor, at: Tensor) -> Tensor:
        """Where int64 codes [B, H, P, S, D] put their bits: int64 [B, H, P, S, W]."""
        return ((codes.gather(4, self.position.expand(*codes.shape[:4], self.words)) >> self.shift) & mask) << at

    def bits(self, codes: Tensor, slots: Tensor) -> Tensor:
        """The words of every token alone: int32 [B, T, H, W] from int64 codes [B, H, T, D] at slots [B, T] of their pages; codes of -1 give all bits of a slot."""
        mask, at = (table[:, 0, slots].transpose(0, 1)[:, :, :, None] for table in (self.mask, self.at))  # [B, H, T, 1, W]
        return self._bits(codes[:, :, :, None], mask, at)[:, :, :, 0].transpose(1, 2).to(torch.int32)

    def unpack(self, words: Tensor, tokens: int) -> Tensor:
        """Invert :meth:`pack`: int32 [B, H, tokens, D]."""
        parts = [self._unpack(part) for part in words.split(_BATCH, 2)] if words.shape[2] else [words.new_empty(*words.shape[:2], 0, PAGE, self.dim)]
        return torch.cat(parts, 2).flatten(2, 3)[:, :, :tokens]

    def _unpack(self, words: Tensor) -> Tensor:
        bits = ((words.long()[:, :, :, None] >> self.at) & self.mask) << self.shift
        codes = bits.new_zeros(*bits.shape[:4], self.dim)
        return codes.scatter_add_(4, self.position.expand_as(bits), bits).to(torch.int32)


def _tiles(spec: Spec, bases: list[int]) -> Tensor:
    """int32 [H, tiles, 8]: tiles of at most 16 stored positions: width, first word, channels of the segment, first level, positions, first position, row of sides."""
    lists = [[] for _ in range(spec.heads)]
    for row, seg in enumerate(spec.segments):
        for at in range(0, seg.size, TILE):
            lists[seg.head].append([seg.width, bases[row] + at, seg.size, seg.book, min(TILE, seg.size - at), seg.start + at, row, 0])
    most = max(map(len, lists))
    return torch.tensor([tiles + [[0] * 8] * (most - len(tiles)) for tiles in lists], dtype=torch.int32, device=spec.levels.device)


def stored_values(spec: Spec, symbols: Tensor, sides: Tensor) -> Tensor:
    """gain * level + offset in stored order, float32 [B, H, T, D], from integer codes [B, H, T, D] and sides [B, R, T]."""
    if spec.channels:
        gain, least = (x.unflatten(1, (spec.heads, -1)).unflatten(3, (-1, PAGE)).transpose(2, 3).flatten(3) for x in sides.float().chunk(2, 1))  # [B, H, P, D]
        page = torch.arange(symbols.shape[2], device=symbols.device) // PAGE
        return spec.levels[symbols + spec.segments[0].book] * gain[:, :, page] + least[:, :, page]
    if spec.bare:
        sides = torch.ones(symbols.shape[0], len(spec.segments), symbols.shape[2], device=symbols.device)
    sides = torch.where(sides == 0, 0.0, torch.exp2((sides.float() - 128) / 8)) if spec.log8 else sides.float()
    x = torch.empty(symbols.shape, device=symbols.device)
    for row, seg in enumerate(spec.segments):
        here = slice(seg.start, seg.start + seg.size)
        x[:, seg.head, :, here] = spec.levels[symbols[:, seg.head, :, here] + seg.book] * sides[:, row, :, None]
        if spec.offset:
            x[:, seg.head, :, here] += sides[:, len(spec.segments) + row, :, None]
    return x


def room(*shape: int, device: torch.device) -> Tensor:
    """Zero words with a few more behind them: a kernel's tile of 16 channels may begin near the end of the last page."""
    count = torch.Size(shape).numel()
    return torch.zeros(count + 2 * PAGE, dtype=torch.int32, device=device)[:count].view(shape)


class Pages:
    """A stream's codes as pages, with the members of `kvq.held.Held`: words [B, H, P, W] int32 and sides [B, P, R, 32].

    Capacity doubles when it is full; a token writes its page only. `sides` are gains (and offsets) in the codec's own type.
    """

    def __init__(self, spec: Spec, layout: Layout, encoder=None):
        """encoder: the codec's own `kernels.encode.Encoder`, if it has one."""
        self.spec, self.layout, self.encoder, self.tokens = spec, layout, encoder, 0
        self.words = self.sides = self.table = None

    def encode(self, x: Tensor) -> bool:
        """Code tokens x [B, H, T, D] after those held, in one launch. False, and nothing done, where no kernel does or the codec must say why not."""
        return self.encoder is not None and backend.use_triton(x) and self.encoder.take([self], [x])

    def append(self, codes: dict[str, Tensor]) -> None:
        """Write the codes of some tokens, as the codec encoded them, after those held."""
        symbols, sides = self.spec.symbols(codes)
        first, added = self.tokens // PAGE, symbols.shape[2]
        if not added:
            return
        begun = self.tokens - first * PAGE
        if begun:
            symbols = torch.cat([self.layout.unpack(self.words[:, :, first : first + 1], begun).to(symbols), symbols], 2)
            sides = torch.cat([self.sides[:, first, :, :begun], sides], 2)
        words = self.layout.pack(symbols)
        self.reserve(first + words.shape[2], words.shape[:2], sides)
        self.words[:, :, first : first + words.shape[2]] = words
        whole = torch.nn.functional.pad(sides, (0, -sides.shape[2] % PAGE)).unflatten(2, (-1, PAGE)).transpose(1, 2)
        self.sides[:, first : first + whole.shape[1]] = whole
        self.tokens += added

    def reserve(self, pages: int, shape: tuple[int, int], like: Tensor) -> None:
        """Room for this many pages of [batch, heads] = shape; sides are made like the tensor [B, R, T]."""
        held = 0 if self.words is None else self.words.shape[2]
        if pages <= held:
            return
        words = room(*shape, max(pages, 2 * held), self.layout.words, device=like.device)
        sides = like.new_zeros(shape[0], words.shape[2], like.shape[1], PAGE)
        if held:
            words[:, :, :held], sides[:, :held] = self.words, self.sides
        self.words, self.sides = words, sides

    def symbols(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """(integer codes [B, H, T, D], sides [B, R, T]) of tokens start (a multiple of 32) to stop, by default of all."""
        stop = self.tokens if stop is None else stop
        pages, count = slice(start // PAGE, -(-stop // PAGE)), stop - start
        words, sides = self.dense(pages)
        sides = sides.transpose(1, 2).flatten(2)
        return self.layout.unpack(words, count), sides if self.spec.channels else sides[..., :count]

    def dense(self, pages: slice) -> tuple[Tensor, Tensor]:
        """Words [B, H, P, W] and sides [B, P, R, 32] of these pages."""
        return self.words[:, :, pages], self.sides[:, pages]

    def strides(self) -> tuple[int, int, int, int]:
        """Words from a sequence to the next, from a head to the next, from a page to the next; sides from a sequence to the next."""
        return *self.words.stride()[:3], self.sides.stride(0)

    @property
    def codes(self) -> dict[str, Tensor]:
        """All codes as the codec encoded them."""
        return self.spec.restore(*self.symbols()) if self.tokens else {}

    def bytes(self) -> int:
        """Bytes of the pages begun, room to grow not counted."""
        pages = -(-self.tokens // PAGE)
        return 0 if self.words is None else sum(x[:, :, :pages].numel() * x.element_size() for x in (self.words, self.sides.transpose(1, 2)))

    def select(self, rows: Tensor) -> "Pages":
        """The same for these batch rows, in this order, repeats allowed."""
        twin = Pages(self.spec, self.layout, self.encoder)
        twin.tokens = self.tokens
        if self.words is not None:
            twin.words = room(len(rows), *self.words.shape[1:], device=self.words.device)
            torch.index_select(self.words, 0, rows.to(self.words.device), out=twin.words)
            twin.sides = self.sides.index_select(0, rows.to(self.sides.device))
        return twin


class Pool(Pages):
    """Pages of many sequences in one store, as a serving engine keeps them: page p of sequence b is page table[b, p] of the store.

    words [N, H, W] int32, sides [N, R, 32], table [B, P] int32, one for keys and values. `kernels.encode.Encoder` writes, with device-side starts.
    """

    def __init__(self, spec: Spec, layout: Layout, words: Tensor, sides: Tensor, table: Tensor, tokens: int):
        """tokens: of the longest sequence. Raises ValueError if the table is too short for them."""
        super().__init__(spec, layout)
        if table.shape[1] * PAGE < tokens:
            raise ValueError(f"A table of {table.shape[1]} pages holds {table.shape[1] * PAGE} tokens a sequence, not {tokens}.")
        self.words, self.sides, self.table, self.tokens = words, sides, table, tokens

    def append(self, codes: dict[str, Tensor]) -> None:
        raise NotImplementedError("A pool takes tokens through kernels.encode.Encoder, with starts and counts.")

    def reserve(self, *args) -> None:
        raise NotImplementedError("A pool has the pages that its table names; the engine that owns it hands out more.")

    def dense(self, pages: slice) -> tuple[Tensor, Tensor]:
        table = self.table[:, pages].long()
        return self.words[table].transpose(1, 2), self.sides[table]

    def strides(self) -> tuple[int, int, int, int]:
        return 0, self.words.stride(1), self.words.stride(0), 0

    def bytes(self) -> int:
        """Bytes of the whole store."""
        return sum(x.numel() * x.element_size() for x in (self.words, self.sides))

    def select(self, rows: Tensor) -> "Pool":
        """The same for these sequences: pages are shared, so whoever appends must give the twin pages of its own first."""
        return Pool(self.spec, self.layout, self.words, self.sides, self.table.index_select(0, rows.to(self.table.device)), self.tokens)
