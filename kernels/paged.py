"""Decode attention over scalar codes in pages: the definition in torch, and the tables and launches of its Triton twin.

Any key codec whose segments are 1 to 8 bits wide, any mixture per head; values at one width. Both may be rotated, centred,
and carry a gain (and an offset) per token and segment. Head dimensions are multiples of 16.
"""

import math

import torch
from torch import Tensor

from kernels import backend
from kernels.attention import Part, attend
from kernels.encode import Encoder, encodable
from kernels.pages import PAGE, TILE, Layout, Pages, Spec, stored_values
from kernels.prefill import attend_pages
from kernels.scalar import consecutive

VALUES = 32  # least channels of one of several segments of a value


def fuse(key, value) -> "PagedAttention | None":
    """Attention over the packed codes of two codecs that offer `paged()`, keys coded after RoPE; None where no kernel serves them."""
    if not hasattr(key, "paged") or not hasattr(value, "paged") or key.space != "post":
        return None
    pair = [codec.paged() for codec in (key, value)]
    return PagedAttention(*pair) if all(s is not None and s.dim % TILE == 0 for s in pair) and _key(pair[0]) and _value(pair[1]) else None


def _whole(spec: Spec) -> bool:
    """Whether every head is one segment of the same width and levels."""
    return len(spec.segments) == spec.heads and len({s[1:] for s in spec.segments}) == 1


def _key(spec: Spec) -> bool:
    """Offsets need one segment a head; scales per channel also at most 4 bits and whole rows of sides."""
    return not (spec.offset or spec.channels) or (_whole(spec) and (not spec.channels or (spec.segments[0].width <= 4 and spec.dim % PAGE == 0)))


def _value(spec: Spec) -> bool:
    """Every head is one segment, or a few of whole tiles, of the same size, width and levels."""
    parts = len(spec.segments) // spec.heads
    same = len({s[2:] for s in spec.segments}) == 1 and spec.segments[0].size * parts == spec.dim
    return same and not spec.channels and (parts == 1 or spec.segments[0].size % VALUES == 0)


def reconstruct(spec: Spec, symbols: Tensor, sides: Tensor) -> Tensor:
    """float32 [B, H, T, D] from integer codes [B, H, T, D] and sides [B, R, T], as `Spec` defines them."""
    x = stored_values(spec, symbols, sides)
    x = x if spec.rotation is None else x @ spec.rotation
    return x if spec.mean is None else x + spec.mean[:, None]


class PagedAttention:
    """The `Fused` of two scalar codecs. Split sizes and tables are made once; a call allocates its outputs and nothing else."""

    def __init__(self, key: Spec, value: Spec):
        self.specs, self.layouts = (key, value), (Layout(key), Layout(value))
        self._encoders = [Encoder(spec) if encodable(spec) else None for spec in self.specs]
        self._tables = None

    def held(self, index: int) -> Pages:
        return Pages(self.specs[index], self.layouts[index], self._encoders[index])

    def attend(
        self, query: Tensor, key: Pages, value: Pages, tokens: int, *, scale: float, first: Tensor | None = None, positions: Tensor | None = None, window: int | None = None
    ) -> Part:
        """As `kernels.attention.attend` over the first `tokens` tokens held; query [B, Hq, D]."""
        batch, device = query.shape[0], query.device
        lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        first = torch.zeros_like(lengths) if first is None else first.int()
        return self.launch(query, key, value, lengths, first, tokens, scale, window=window)

    def attend_chunk(self, query: Tensor, key: Pages, value: Pages, tokens: int, at: int, *, scale: float, first: Tensor | None = None) -> Part:
        """As `kernels.prefill.attend_pages`: causal attention of query [B, Hq, C, D], whose first stands at position `at` of the tokens held."""
        return attend_pages(query, key, value, tokens, at, scale=scale, first=first)

    def tables(self, device: torch.device) -> "_Tables":
        if self._tables is None or self._tables.groups.device != device:
            self._tables = _Tables(*self.specs, self.layouts[0], device)
        return self._tables

    def launch(
        self, query: Tensor, key: Pages, value: Pages, lengths: Tensor, first: Tensor, longest: int, scale: float, splits: int | None = None,
        window: int | None = None, dtype: torch.dtype = torch.float32,
    ) -> Part:  # fmt: skip
        """The same with device-side lengths [B] int32 of at most `longest` tokens: nothing is read back, so it can be captured.

        window: only the last `window` tokens of a sequence are visible. Keys and values in a `Pool` share its table.
        dtype: of the output; the log-sum-exp is float32.
        """
        if not backend.use_triton(query):
            dense = [reconstruct(pages.spec, *pages.symbols(0, longest)) for pages in (key, value)]
            output, lse = attend(query, *dense, scale, first, window, lengths)
            return output.to(dtype), lse
        from kernels import merge_triton, query_triton
        from kernels import paged_triton as twin

        table, (k, v) = self.tables(query.device), self.specs
        batch, heads, dim, group = query.shape[0], k.heads, k.dim, query.shape[1] // k.heads
        wide = max(8, 1 << (group - 1).bit_length())
        rows, block = table.rows, 8 * table.rows
        parts = len(v.segments) // heads
        blocks = max(1, -(-longest // block)) if window is None else max(1, -(-min(longest, window + block) // block))
        splits = min(blocks, splits or max(1, backend.programs(query.device) // (batch * heads)))
        per_split = -(-blocks // splits) * block
        splits = -(-blocks * block // per_split)
        positions, early = table.matrix.shape[1], backend.early(query, splits)
        new = lambda *shape: torch.empty(shape, device=query.device)  # noqa: E731
        turned, aux = query_triton.rotate(query, table.matrix, table.sums, scale * math.log2(math.e), early)
        out, stat = new(batch, heads, splits, wide, dim), new(batch, heads, splits, 2, wide)
        twin.decode_split[(splits, heads, batch)](
            turned, aux, key.words, key.sides, value.words, value.sides, table.groups, table.books, table.value_levels, table.value_books, table.shifts, first, lengths,
            lengths if key.table is None else key.table, out, stat, *key.strides()[:2], key.strides()[3], key.sides.shape[-2], *value.strides()[:2],
            value.strides()[3], value.sides.shape[-2], len(v.segments), len(k.segments), per_split, 2**30 if window is None else window,
            0 if key.table is None else key.table.stride(0),
            heads, positions // TILE, table.groups.shape[1], table.width, v.segments[0].width, dim,
            key.strides()[2], value.strides()[2], min(backend.VTILE, dim // parts) if dim % 32 == 0 else 16, wide, rows,
            k.log8, v.log8, k.offset, v.offset, k.bare or k.channels, v.bare, table.align, backend.AHEAD, backend.ASM, k.channels, parts, key.table is not None,
            backend.UNROLL, backend.VALUE_AHEAD, backend.KEY_UNROLL, table.widest, table.key_integer, table.value_integer, early,
            num_warps=1, num_stages=backend.STAGES, **backend.LIMIT, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
        return merge_triton.merge(out, stat, group, table.back, table.mean, early, dtype)


class _Tables:
    """What the kernels look up, from the codecs' specifications."""

    rows = 16  # rows of 8 tokens that a program reads at a time

    def __init__(self, key: Spec, value: Spec, layout: Layout, device: torch.device):
        eye = torch.eye(key.dim, device=key.levels.device)[None]
        rotation = (eye if key.rotation is None else key.rotation).expand(key.heads, -1, -1).float()
        by_head = [[(i, s) for i, s in enumerate(key.segments) if s.head == h] for h in range(key.heads)]
        most = max(sum(-(-s.size // TILE) for _, s in segs) for segs in by_head)
        groups = torch.zeros(key.heads, max(map(len, by_head)), 16, dtype=torch.int32)
        self.matrix = torch.zeros(key.heads, most * TILE, key.dim, device=device)
        books = key.levels.half().cpu()
        for head, segs in enumerate(by_head):
            at = 0
            for number, (row, seg) in enumerate(segs):
                end = at + -(-seg.size // TILE)
                groups[head, number, :8] = torch.tensor([at, end, row, seg.width, layout.bases[row], seg.size, seg.book, len(segs)])
                groups[head, number, 8:] = level_bytes(books[seg.book :][: 2 ** min(seg.width, 4)])
                self.matrix[head, at * TILE : at * TILE + seg.size] = rotation[head, seg.start : seg.start + seg.size]
                at = end
        self.width = key.segments[0].width if _whole(key) and key.segments[0].width <= 4 else 0  # 0: read widths from `groups`
        self.key_integer = self.width > 0 and consecutive(books[key.segments[0].book :][: 2**self.width])
        self.align = 2 if all(s.size % 2 == 0 for s in key.segments) else 1  # RoPE blocks are pairs of channels
        mean = torch.zeros(key.heads, key.dim) if key.mean is None else key.mean
        self.sums = torch.stack([mean.to(device), self.matrix.sum(1)], 1).contiguous()
        self.groups, self.books = groups.to(device), books.to(device)
        self.widest = max(s.width for s in key.segments)
        seg = value.segments[0]
        self.value_books = value.levels[seg.book : seg.book + 2**seg.width].half().to(device)
        self.value_integer = seg.width <= 4 and consecutive(self.value_books)
        self.value_levels = level_bytes(self.value_books[:16].cpu()).to(device)
        self.back = (eye if value.rotation is None else value.rotation).to(device).mT.contiguous()
        self.mean = (torch.zeros(value.heads, value.dim) if value.mean is None else value.mean).to(device).contiguous()
        row = torch.arange(self.rows)
        self.shifts = torch.cat([row % 2 * 2, row % PAGE % 4]).to(device, torch.int32)


def level_bytes(levels: Tensor) -> Tensor:
    """Up to 16 float16 levels as int32 [8]: four words of high bytes, four of low bytes, level 4 i + k in byte k of word i."""
    bits = torch.nn.functional.pad(levels.view(torch.int16).long() & 0xFFFF, (0, 16 - len(levels))).view(4, 4)
    shift = 8 * torch.arange(4)
    return torch.cat([(part << shift).sum(1) for part in (bits >> 8, bits & 255)]).to(torch.int32)
