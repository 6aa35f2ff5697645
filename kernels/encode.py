"""Tokens to pages in one launch: norm, rotation, nearest level, gain, bits, written behind what the pages hold.

:func:`symbols` defines, in float64 as the codecs' own `encode`; kernels work in float32 (a 16-bit token is taken exactly, the rotation to 2**-25, of
bfloat16 to 18 bits). Codes are equal except where a rotated value lies on a threshold, or within about 1e-5 of it relative to the vector's norm; a gain may
differ by its last bit, and one beyond float16, which the codec refuses, is infinite. Prompts of 16-bit tokens take the kernels of :mod:`kernels.encode_whole` and
:mod:`kernels.encode_segments` where levels are symmetric; single tokens and all else those of :mod:`kernels.encode_triton`.
"""

import torch
from torch import Tensor

from kernels import backend, encode_segments, encode_whole
from kernels.pages import PAGE, Pages, Spec
from kernels.scalar import nearest

TILE = 16
PARTS = {torch.float16: 2, torch.bfloat16: 3, torch.float32: 1}
"""Matrices of a type that add up to a float32 rotation, each SCALES times smaller than the one before."""
SCALES = {torch.float16: 2.0**-12, torch.bfloat16: 2.0**-8, torch.float32: 1.0}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def encodable(spec: Spec) -> bool:
    """Whether the kernel serves this codec: gains of norm or least squares, head dimension a power of two from 16 on, 1 to 8 bits."""
    return spec.gain in ("unit_norm", "least_squares") and not spec.offset and not spec.channels and spec.dim >= TILE and spec.dim & (spec.dim - 1) == 0


def symbols(spec: Spec, x: Tensor) -> tuple[Tensor, Tensor]:
    """(integer codes [B, H, T, D] by stored position, gains [B, segments, T] as they are stored) of tokens x [B, H, T, D]; reads nothing back to the host."""
    y = x.double() if spec.mean is None else x.double() - spec.mean[:, None]
    y = y if spec.rotation is None else y @ spec.rotation.to(y.dtype).mT
    codes, gains = torch.empty_like(y, dtype=torch.int32), []
    for seg in spec.segments:
        part = y[:, seg.head, :, seg.start : seg.start + seg.size]
        norm = part.square().sum(-1).sqrt()
        levels = spec.levels[seg.book : seg.book + 2**seg.width].to(y.dtype)
        code = nearest(part * (seg.size**0.5 / torch.where(norm > 0, norm, 1.0))[..., None], levels)
        level = levels[code]
        power = level.square().sum(-1)
        gains.append((part * level).sum(-1) / power if spec.gain == "least_squares" else norm / power.sqrt())
        codes[:, seg.head, :, seg.start : seg.start + seg.size] = code
    gain = torch.stack(gains, 1)
    if spec.log8:
        gain = ((8 * gain.clamp_min(2.0**-30).log2()).round() + 128).clamp(0, 255)
    return codes, gain.to(spec.stored)


def write(pages: Pages, x: Tensor, starts: Tensor, counts: Tensor) -> None:
    """Code tokens x [B, H, T, D] and write the first counts[b] of them behind starts[b] of `pages`; bits of other tokens stay as they are.

    Words and sides are added to as integers: a token beyond counts adds nothing, wherever it points.
    """
    codes, gains = symbols(pages.spec, x)
    token = torch.arange(x.shape[2], device=x.device)
    fresh = token < counts[:, None]
    at = torch.where(fresh, starts[:, None] + token, 0)  # [B, T]
    page, slot = at // PAGE, at % PAGE
    row = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(page)
    where = (row, page) if pages.table is None else (pages.table[row, page].long(),)
    words = pages.words.transpose(1, 2) if pages.table is None else pages.words  # [.., H, W]
    old = words[where] & pages.layout.bits(torch.full_like(codes, -1, dtype=torch.int64), slot)
    words.index_put_(where, (pages.layout.bits(codes.long(), slot) - old) * fresh[..., None, None], accumulate=True)
    integer = INTEGERS[pages.sides.element_size()]
    sides = pages.sides.view(integer).transpose(-1, -2)  # [.., 32, R]
    new = gains.transpose(1, 2).contiguous().view(integer)
    sides.index_put_((*where, slot), (new - sides[(*where, slot)]) * fresh[..., None], accumulate=True)


class Encoder:
    """Appends the keys and values of one layer (two streams) or one stream alone. `specs` must pass :func:`encodable`."""

    def __init__(self, *specs: Spec):
        self.specs = specs
        # None is replaced: a captured graph reads those it was captured with. Launches code prompts of 16-bit tokens, tables all else.
        self._tables: dict[tuple[torch.device, torch.dtype], _Tables] = {}
        self._launches: dict[tuple[torch.device, torch.dtype], encode_whole.Whole | encode_segments.Segments] = {}
        # A launch writes sides of one type; streams of different types take one launch each.
        self._apart = [Encoder(spec) for spec in specs] if len({spec.stored for spec in specs}) > 1 else []
        self._whole, self._symmetric = encode_whole.served(specs), encode_whole.symmetric(specs)
        # So do prompts of which one stream alone is coded whole.
        alone = [encode_whole.served((spec,)) for spec in specs]
        self._prompts = self._apart or ([Encoder(spec) for spec in specs] if any(alone) and not self._whole else [])

    def take(self, held: list[Pages], xs: list[Tensor]) -> bool:
        """Code xs, [B, H, T, D] for each stream, behind the tokens of `held`, which grow as needed; one value is read back to the host.

        False, and nothing is held, where the codec would have something to refuse: a shape, a value that is not finite, a gain that is too large.
        """
        batch, _, tokens, _ = xs[0].shape
        if any(x.shape != (batch, spec.heads, tokens, spec.dim) for x, spec in zip(xs, self.specs)):
            return False
        if not tokens:
            return True
        device = xs[0].device
        for pages, spec in zip(held, self.specs):
            like = torch.empty(batch, len(spec.segments), 0, dtype=spec.stored, device=device)
            pages.reserve(-(-(pages.tokens + tokens) // PAGE), (batch, spec.heads), like)
        starts = torch.full((batch,), held[0].tokens, dtype=torch.int32, device=device)
        self.append(held, xs, starts, torch.full_like(starts, tokens))
        sound = bool(torch.stack([_sound(pages, x) for pages, x in zip(held, xs)]).all())
        for pages in held:
            pages.tokens += tokens if sound else 0
        return sound

    def append(self, held: list[Pages], xs: list[Tensor], starts: Tensor, counts: Tensor) -> None:
        """Code xs, [B, H, T, D] for each stream, into pages that have room, without a look at them from the host: what a graph can hold.

        starts, counts [B] int32 on the device: where to write and how many tokens. `tokens` of `held` and values that are not finite are the caller's.
        """
        x, spec = xs[0], self.specs[0]
        batch, _, tokens, dim = x.shape
        if not tokens:
            return
        if apart := self._apart if tokens == 1 or x.dtype == torch.float32 else self._prompts:
            for encoder, pages, part in zip(apart, held, xs):
                encoder.append([pages], [part], starts, counts)
            return
        if not backend.use_triton(x):
            for pages, part in zip(held, xs):
                write(pages, part, starts, counts)
            return
        xs = [part if part.stride(-1) == 1 else part.contiguous() for part in xs]
        if self._symmetric and tokens > 1 and x.dtype in encode_whole.TYPES:
            if (x.device, x.dtype) not in self._launches:
                layouts = [pages.layout for pages in held]
                launch = encode_whole.Whole(self.specs, x.device, x.dtype) if self._whole else encode_segments.Segments(self.specs, layouts, x.device, x.dtype)
                self._launches[x.device, x.dtype] = launch
            self._launches[x.device, x.dtype](held, xs, starts, counts)
            return
        from kernels import encode_triton as twin

        if (x.device, x.dtype) not in self._tables:
            self._tables[x.device, x.dtype] = _Tables(self.specs, [p.layout for p in held], x.device, x.dtype)
        table = self._tables[x.device, x.dtype]
        (k, v), (kx, vx) = (held * 2)[:2], (xs * 2)[:2]
        ks, vs = (self.specs * 2)[:2]
        pages = -(-tokens // PAGE) + (tokens % PAGE != 1)  # tokens that begin inside a page end one page later
        heads, groups = spec.heads * len(xs), table.groups.shape[1]
        kernel, grid, warps = (twin.encode_token, (heads, batch), 8) if tokens == 1 else (twin.encode_pages, (pages, heads, batch), 4 if x.dtype == torch.float32 else 1)
        kernel[grid](
            kx, vx, k.words, k.sides, v.words, v.sides, table.matrix, table.shift, table.mean, table.tiles, table.groups, table.places, table.heap,
            starts, counts, *encode_whole.addresses(k, v, kx, vx, counts), table.matrix.stride(0),
            spec.heads, table.tiles.shape[1], groups, dim, k.strides()[2], v.strides()[2], ks.log8, vs.log8,
            ks.gain == "least_squares", vs.gain == "least_squares",
            table.matrix.shape[0], SCALES[x.dtype], table.widest, k.table is not None, 1 << (groups - 1).bit_length(), backend.ASM, num_warps=warps, num_stages=1,
        )  # fmt: skip


def _sound(pages: Pages, x: Tensor) -> Tensor:
    """Whether the tokens just written behind those held are finite and their gains within the stored type; the largest gain is left to the codec."""
    new = pages.sides[:, pages.tokens // PAGE : -(-(pages.tokens + x.shape[2]) // PAGE)]
    largest = 255 if pages.spec.log8 else torch.finfo(pages.spec.stored).max
    return torch.linalg.vector_norm(x, torch.inf).isfinite() & (new.amax() < largest)


class _Tables:
    """What the kernels read, as `kernels.encode_triton` describes it: the streams' heads one after the other."""

    def __init__(self, specs: tuple[Spec, ...], layouts: list, device: torch.device, dtype: torch.dtype):
        dim = specs[0].dim
        tiles, groups, places, heap, found = [], [], [], [], {}
        for stream, (spec, layout) in enumerate(zip(specs, layouts)):
            for head in range(spec.heads):
                tiles.append([])
                groups.append([])
                places.append([[0] * 8] * dim)
                for row, seg in enumerate(spec.segments):
                    if seg.head != head:
                        continue
                    book = found.setdefault((stream, seg.book, seg.width), len(heap))
                    if book == len(heap):
                        heap += _heap(spec.levels[seg.book : seg.book + 2**seg.width].tolist())
                    begin = len(tiles[-1])
                    for at in range(0, seg.size, TILE):
                        tiles[-1].append([seg.width, layout.bases[row] + at, seg.size, book, min(TILE, seg.size - at), seg.start + at, 0, 0])
                    for at in range(seg.size):
                        places[-1][seg.start + at] = [seg.width, book, layout.bases[row] + at, seg.size, len(groups[-1]), 0, 0, 0]
                    groups[-1].append([begin, len(tiles[-1]), row, seg.size])
        self.widest = max(seg.width for spec in specs for seg in spec.segments)
        integers = lambda lists: torch.tensor([x + [[0] * len(x[0])] * (max(map(len, lists)) - len(x)) for x in lists], dtype=torch.int32, device=device)  # noqa: E731
        self.tiles, self.groups, self.places = integers(tiles), integers(groups), integers(places)
        self.heap = torch.tensor(heap, device=device)
        eye = torch.eye(dim, device=device)[None]
        rotation = torch.cat([(eye if s.rotation is None else s.rotation.to(device)).expand(s.heads, -1, -1) for s in specs]).double()
        rotation = torch.nn.functional.pad(rotation, (0, 0, 0, TILE))  # the last tile may be narrower than it is read
        self.mean = torch.cat([torch.zeros(s.heads, dim, device=device) if s.mean is None else s.mean.to(device) for s in specs])
        self.shift = (rotation @ self.mean.double().unsqueeze(-1)).squeeze(-1).float()
        parts, rest = [], rotation
        for _ in range(PARTS[dtype]):
            parts.append(rest.to(dtype))
            rest = (rest - parts[-1].double()) / SCALES[dtype]
        self.matrix = torch.stack(parts)


def _heap(levels: list[float]) -> list[float]:
    """Thresholds in the order of bisection from index 1 on, then the levels: the leaf of code c at len(levels) + c."""
    count, nodes = len(levels), [0.0]
    span = count
    while span > 1:  # a row of the tree: nodes that part `span` codes each
        nodes += [(levels[at - 1] + levels[at]) / 2 for at in range(span // 2, count, span)]
        span //= 2
    return nodes + levels
