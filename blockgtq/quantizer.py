"""Block-GTQ: keys coded per RoPE block at integer widths that follow the blocks' energy (arXiv 2606.24033).

Calibration gives each block a score; the greedy allocation turns scores into widths; blocks of equal width form a group, and a
group is coded by TurboQuant-MSE with its own norm and rotation. Values never enter a RoPE logit and use TurboQuantMSE.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kernels.paged import fuse
from kernels.pages import Segment, Spec
from kernels.rotate import haar
from kernels.scalar import midpoints

from .allocate import allocate_tiles
from .energy import SCORES, score_blocks
from .gain import GAINS, NORM_BYTES, STORED, channel_mean, load_norm, prepare, solve_gain, store_norm
from .layout import Group, arrange, static_pairs, unrotated
from .stream import MixedStream
from .turboquant import CODEBOOKS, TILE, choose, scalar_levels

PARTIAL = ("full", "split", "merge")


class BlockGTQ(nn.Module):
    """Codec of keys [B, H, T, D] at `bits` code bits per channel on average, fractional averages included.

    Codes: "codes" uint8 [B, H, T, bytes], every head at the same number of bits; "norm" [B, 1, T, S], one gain for each of the
    S groups of all heads, nothing padded. `partial` says what happens to channels that RoPE does not rotate: "full" pairs them
    into static blocks that compete for bits like the others, "split" codes them as a group of their own at floor(bits), "merge"
    puts them into the group of that width. `tile`: so many blocks share a width (`allocate_tiles`; 1 in the paper).
    """

    block = 1
    grad_group = None

    def __init__(
        self,
        bits: float,
        *,
        score: str = "qk_avg",
        b_min: int = 1,
        b_max: int = 8,
        tile: int = 1,
        codebook: str = "gaussian",
        gain: str = "unit_norm",
        center: bool = False,
        partial: str = "full",
        norm_dtype: str = "float16",
        space: str = "post",
        seed: int = 0,
    ):
        super().__init__()
        if not 1 <= b_min <= b_max <= 8:
            raise ValueError(f"b_min and b_max must satisfy 1 <= b_min <= b_max <= 8, got {b_min} and {b_max}.")
        if not b_min <= bits <= b_max:
            raise ValueError(f"BlockGTQ takes an average of {b_min} to {b_max} bits (b_min to b_max), got {bits}.")
        if tile < 1 or tile != int(tile):
            raise ValueError(f"tile={tile} must be a whole number of blocks from 1 on.")
        self.code_bits, self.b_min, self.b_max, self.tile = float(bits), int(b_min), int(b_max), int(tile)
        self.score = choose("score", score, tuple(SCORES))
        self.codebook = choose("codebook", codebook, CODEBOOKS)
        self.gain = choose("gain", gain, GAINS)
        self.center = bool(center)
        self.partial = choose("partial", partial, PARTIAL)
        self.norm_dtype = choose("norm_dtype", norm_dtype, tuple(NORM_BYTES))
        self.space = choose("space", space, ("pre", "post"))
        self.seed = int(seed)
        self.register_buffer("widths", None)  # [H, L] uint8: bits of every RoPE block, static blocks last
        self.register_buffer("order", None)  # [H, D] int16: channel stored at each position
        self.register_buffer("groups", None)  # [S, 6] int32: head, start, size, width, offsets into rotations and levels
        self.register_buffer("rotations", None)  # float32, distinct rotations one after the other
        self.register_buffer("levels", None)  # float32, distinct codebooks of unit variance one after the other
        self.register_buffer("mean", None)  # [H, D] float32, or None
        self._tables: _Tables | None = None

    @property
    def bits(self) -> float:
        """Stored bits per value: packed codes and norms of all groups; widths, codebooks and rotations excluded."""
        heads, dim = self._fitted().order.shape
        return 8 * (heads * self._tables.stream.row_bytes + len(self.groups) * NORM_BYTES[self.norm_dtype]) / (heads * dim)

    def check(self, heads: int, head_dim: int) -> None:
        """Raise ValueError if tiles do not divide the blocks of a head; where some channels are not rotated, `fit` finds out."""
        if self.partial == "full" and head_dim // 2 % self.tile:
            raise ValueError(f"tile={self.tile} does not divide the {head_dim // 2} RoPE blocks of a head of {head_dim}; choose a divisor.")

    def fit(self, calibration: Any) -> "BlockGTQ":
        """Allocate widths from calibration.x [H, N, D], .queries and .pairs, and make the tables.

        Raises ValueError for values, for a model without RoPE and for a score whose queries are missing.
        """
        if calibration.kind != "key" or calibration.pairs is None:
            raise ValueError("BlockGTQ codes keys of models with rotary embedding; use TurboQuantMSE for values.")
        device, dim = calibration.x.device, calibration.x.shape[-1]
        pairs = calibration.pairs.cpu()
        rest = unrotated(pairs, dim)
        rest_width = min(max(int(self.code_bits), self.b_min), self.b_max)
        if self.partial == "full":
            pairs, rest = torch.cat([pairs, static_pairs(rest)]), rest[:0]
        mean = channel_mean(calibration.x) if self.center else None
        keys = calibration.x if mean is None else calibration.x - mean[:, None]
        scores = score_blocks(keys, calibration.queries, pairs.to(device), self.score).cpu()
        widths = allocate_tiles(scores, self.code_bits, self.tile, self.b_min, self.b_max)
        order, groups = arrange(widths, pairs, rest, rest_width, self.partial == "merge")
        self.widths, self.order, self.mean = widths.to(device, torch.uint8), order.to(device, torch.int16), mean
        self._tabulate(groups)
        return self

    def _tabulate(self, groups: list[Group]) -> None:
        rotations, levels, rows = {}, {}, []
        for g in groups:
            rotations.setdefault((g.size, g.seed), haar(g.size, g.seed + self.seed).flatten())
            # Gaussian levels do not depend on the group's size and are stored once per width.
            book = (g.width, g.size if self.codebook == "exact" else 0)
            levels.setdefault(book, scalar_levels(g.width, g.size, self.codebook))
            rows.append([g.head, g.start, g.size, g.width, _offset(rotations, (g.size, g.seed)), _offset(levels, book)])
        device = self.order.device
        self.groups = torch.tensor(rows, dtype=torch.int32, device=device)
        self.rotations = torch.cat(list(rotations.values())).to(device)
        self.levels = torch.cat(list(levels.values())).to(device)
        self._tables = None

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Code x [B, H, T, D]; a key's codes do not depend on its neighbours in the call.

        Raises ValueError for a wrong shape, a value that is not finite, or a norm beyond the range of norm_dtype.
        """
        heads, dim = self._fitted().order.shape
        if x.dim() != 4 or (x.shape[1], x.shape[3]) != (heads, dim):
            raise ValueError(f"BlockGTQ was fitted for [B, {heads}, T, {dim}], got {list(x.shape)}.")
        parts = [self._encode(tile, self._tables) for tile in x.split(TILE, 2)]
        return {name: torch.cat([part[name] for part in parts], 2) for name in parts[0]}

    def _encode(self, x: Tensor, tables: "_Tables") -> dict[str, Tensor]:
        x = prepare(x, self.mean)
        rotated = x @ tables.rotation.to(x.dtype).mT
        member = tables.member.to(x.dtype)
        norm = (rotated.square() @ member).sqrt()  # [B, H, T, groups of a head]
        unit = rotated * (torch.where(norm > 0, tables.root_size / norm, 0.0) @ member.mT)
        codes = tables.nearest(unit)
        y = tables.lookup(codes).to(x.dtype)
        gain = solve_gain(norm, (rotated * y) @ member, y.square() @ member + tables.absent, self.gain)
        gain = gain.transpose(1, 2).flatten(2)[:, None, :, tables.present]
        return {"codes": tables.stream.pack(codes), "norm": store_norm(gain, self.norm_dtype)}

    def decode(self, codes: dict[str, Tensor]) -> Tensor:
        """Reconstruct [B, H, T, D] float32."""
        tables = self._fitted()._tables
        tiles = zip(codes["codes"].split(TILE, 2), codes["norm"].split(TILE, 2), strict=True)
        return torch.cat([self._decode(packed, norm, tables) for packed, norm in tiles], 2)

    def _decode(self, packed: Tensor, norm: Tensor, tables: "_Tables") -> Tensor:
        y = tables.lookup(tables.stream.unpack(packed))
        gain = load_norm(norm, self.norm_dtype)[:, 0][..., tables.group].transpose(1, 2)  # [B, H, T, D]
        x = (y * gain) @ tables.rotation
        return x if self.mean is None else x + self.mean[:, None]

    def paged(self) -> Spec:
        """The codec as kernels read it."""
        tables = self._fitted()._tables
        segments = tuple(Segment(head, start, size, width, book) for head, start, size, width, _, book in self.groups.tolist())
        heads, dim = self.order.shape
        numbers = segments, self.levels, tables.rotation, self.mean, self._symbols, self._restore, STORED[self.norm_dtype]
        return Spec(heads, dim, *numbers, log8=self.norm_dtype == "log8", gain=self.gain)

    def fuse(self, value: nn.Module):
        """Attention over packed codes with this value codec, or None where no kernel serves the pair."""
        return fuse(self, value)

    def _symbols(self, codes: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self._fitted()._tables.stream.unpack(codes["codes"]), codes["norm"][:, 0].transpose(1, 2)

    def _restore(self, symbols: Tensor, sides: Tensor) -> dict[str, Tensor]:
        return {"codes": self._fitted()._tables.stream.pack(symbols), "norm": sides.transpose(1, 2)[:, None].contiguous()}

    def _fitted(self) -> "BlockGTQ":
        if self.groups is None:
            raise RuntimeError("BlockGTQ: call fit before encode, decode or bits.")
        if self._tables is None or self._tables.source is not self.groups:
            self._tables = _Tables(self.order, self.groups, self.rotations, self.levels)
        return self


class _Tables:
    """The buffers of a fitted codec unrolled over heads and positions, rebuilt whenever the codec is restored or moved."""

    def __init__(self, order: Tensor, groups: Tensor, rotations: Tensor, levels: Tensor):
        self.source = groups
        (heads, dim), device = order.shape, order.device
        rows = groups.tolist()
        slots = max(sum(row[0] == head for row in rows) for head in range(heads))
        self.rotation = torch.zeros(heads, dim, dim, device=device)  # rows: stored positions, columns: channels
        self.member = torch.zeros(heads, dim, slots, device=device)
        self.group = torch.zeros(heads, dim, dtype=torch.int64, device=device)
        widths = torch.zeros(heads, dim, dtype=torch.int64, device=device)
        self.base = torch.zeros(heads, 1, dim, dtype=torch.int64, device=device)
        self.thresholds = torch.full((heads, dim, 2 ** max(row[3] for row in rows) - 1), torch.inf, device=device)
        present, size_of = [], torch.ones(heads, 1, slots, device=device)
        slot, previous = 0, -1
        for index, (head, start, size, width, at, book) in enumerate(rows):
            slot, previous = (slot + 1 if head == previous else 0), head
            here = slice(start, start + size)
            self.rotation[head, here, order[head, here].long()] = rotations[at : at + size * size].view(size, size)
            self.member[head, here, slot] = 1
            self.group[head, here], widths[head, here], self.base[head, 0, here] = index, width, book
            self.thresholds[head, here, : 2**width - 1] = midpoints(levels[book : book + 2**width])
            size_of[head, 0, slot] = size
            present.append(head * slots + slot)
        self.levels = levels
        self.root_size = size_of.double().sqrt() if device.type != "mps" else size_of.sqrt()
        self.present = torch.tensor(present, device=device)
        self.absent = (self.member.sum(1, keepdim=True) == 0).to(self.root_size.dtype)  # unused slots: |y|^2 = 1, not 0
        self.stream = MixedStream(widths)

    def nearest(self, unit: Tensor) -> Tensor:
        """Codes [B, H, T, D] int32; a value exactly on a threshold takes the lower level, as in kernels.scalar.nearest."""
        values = unit.permute(1, 3, 0, 2).flatten(2).contiguous()  # [H, D, B T]: one codebook per row
        codes = torch.searchsorted(self.thresholds.to(unit.dtype), values, out_int32=True)
        return codes.unflatten(2, (unit.shape[0], unit.shape[2])).permute(2, 0, 3, 1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Levels [B, H, T, D] float32 of codes [B, H, T, D]."""
        return self.levels[codes + self.base]


def _offset(tables: dict, key: tuple[int, int]) -> int:
    """Where a table starts once all tables are concatenated in insertion order."""
    offset = 0
    for name, table in tables.items():
        if name == key:
            return offset
        offset += len(table)
    raise KeyError(key)
