"""One layer's keys or values over time: [ sink exact | codes | window exact ], each token encoded once.

Tokens keep their place: a token is exact when it arrives and becomes codes when `window` newer tokens (and a whole block) stand
behind it. Codes are append-only. With `memo` a decoded copy of the coded prefix is kept so that reading costs no decode; it is a
copy of `decode(codes)`, never of the input, and it is not counted as cache bytes. Memory and latency runs switch it off.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from kvq.held import Held
from kvq.quantizer import Codes, select

Turn = Callable[[Tensor, Tensor], Tensor]


class Stream:
    """A growing [B, H, T, D] tensor held as codes.

    rotate / unrotate: given for keys coded before RoPE; they take (x, positions [B, T]) and return float32.
    held: where the codes are kept; a kernel brings its own order of the same bits.
    """

    def __init__(self, codec, sink: int, window: int, memo: bool, turns: tuple[Turn, Turn] | None = None, held: Held | None = None):
        self.codec, self.sink, self.window, self.memo, self.turns = codec, sink, window, memo, turns
        self.length = self.encoded = 0
        self.held = held or Held()
        self.state: dict[str, Tensor] = {}
        self.head = self.tail = self.positions = self._memo = None

    def append(self, x: Tensor, positions: Tensor | None = None) -> None:
        """Take x [B, H, T, D] (positions [B, T] for codecs before RoPE) and encode what leaves the window."""
        if self.tail is None:
            self.head = self.tail = x[:, :, :0]
        start = self.length
        self.length += x.shape[2]
        if self.turns:
            self.positions = positions if self.positions is None else torch.cat([self.positions, positions], dim=1)
        if self.memo:
            self._place(start, x)
        room = self.sink - self.head.shape[2]
        if room > 0:
            self.head = torch.cat([self.head, x[:, :, :room]], dim=2)
            x = x[:, :, room:]
        self.tail = torch.cat([self.tail, x], dim=2)
        ready = self.tail.shape[2] - self.window
        ready -= ready % self.codec.block
        if ready > 0:
            self._encode(self.tail[:, :, :ready])
            self.tail = self.tail[:, :, ready:].clone()

    def _encode(self, x: Tensor) -> None:
        start = self.head.shape[2] + self.encoded
        where = slice(start, start + x.shape[2])
        if self.turns:
            x = self.turns[1](x, self.positions[:, where])
        if self.memo or not self.held.encode(x):
            stateful = getattr(self.codec, "stateful", False)
            codes = self.codec.encode(x, self.state) if stateful else self.codec.encode(x)
            self.held.append(codes)
            if self.memo:
                self._place(start, self._decode(codes, where))
        self.encoded += x.shape[2]

    @property
    def codes(self) -> Codes:
        """All codes, as the codec made them."""
        return self.held.codes

    def _decode(self, codes: Codes, where: slice) -> Tensor:
        x = self.codec.decode(codes)
        if self.turns:
            x = self.turns[0](x, self.positions[:, where])
        return x.to(self.tail.dtype)

    def _place(self, start: int, x: Tensor) -> None:
        end = start + x.shape[2]
        if self._memo is None or end > self._memo.shape[2]:
            grown = x.new_empty(*x.shape[:2], max(end, start * 5 // 4, 64), x.shape[3])
            if start:
                grown[:, :, :start] = self._memo[:, :, :start]
            self._memo = grown
        self._memo[:, :, start:end] = x

    def read(self) -> Tensor:
        """[B, H, length, D] in the dtype that came in: exact sink and window, everything else decoded from codes."""
        if self.memo:
            return self._memo[:, :, : self.length]
        parts = [self.head, self.tail]
        if self.encoded:
            start = self.head.shape[2]
            parts.insert(1, self._decode(self.codes, slice(start, start + self.encoded)))
        return torch.cat(parts, dim=2)

    def beside(self, coded: int) -> Tensor:
        """[B, H, length - coded, D]: every token but the first `coded` (whole blocks) that are held as codes."""
        parts = [self.head, self.tail]
        if self.encoded > coded:
            start = self.head.shape[2]
            codes = {name: leaf[:, :, coded // self.codec.block :] for name, leaf in self.codes.items()}
            parts.insert(1, self._decode(codes, slice(start + coded, start + self.encoded)))
        return torch.cat(parts, dim=2)

    @property
    def exact(self) -> int:
        """Tokens held in full precision (sink and window)."""
        return 0 if self.tail is None else self.head.shape[2] + self.tail.shape[2]

    def bytes(self) -> tuple[int, int, int]:
        """(bytes of codes, bytes of exact tokens and state, values coded)."""
        if self.tail is None:
            return 0, 0, 0
        exact = sum(t.numel() * t.element_size() for t in (self.head, self.tail, *self.state.values()))
        batch, heads, _, dim = self.tail.shape
        return self.held.bytes(), exact, batch * heads * dim * self.encoded

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order, repeats allowed (beam search)."""
        self.held, self.state = self.held.select(rows), select(self.state, rows)
        for name in ("head", "tail", "positions", "_memo"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).index_select(0, rows.to(self.tail.device)))


class RaggedStream:
    """Left-padded rows, one stream each, counted from the row's first real token.

    Sinks, token groups and running statistics must not see padding; where a codec has any of them, rows of different lengths
    are coded apart, so a padded row equals the row alone. Same interface as :class:`Stream`.
    """

    def __init__(self, make: Callable[[], Stream], pads: list[int]):
        self.pads, self.rows, self.make = pads, [make() for _ in pads], make
        self.length = 0

    def append(self, x: Tensor, positions: Tensor | None = None) -> None:
        for b, (pad, row) in enumerate(zip(self.pads, self.rows)):
            skip = max(pad - self.length, 0)
            row.append(x[b : b + 1, :, skip:], None if positions is None else positions[b : b + 1, skip:])
        self.length += x.shape[2]

    def read(self) -> Tensor:
        return torch.cat([torch.nn.functional.pad(row.read(), (0, 0, pad, 0)) for pad, row in zip(self.pads, self.rows)])

    @property
    def encoded(self) -> int:
        return min(row.encoded for row in self.rows)

    @property
    def exact(self) -> int:
        return self.length - self.encoded if all(r.encoded + r.exact + p == self.length for r, p in zip(self.rows, self.pads)) else -1

    def bytes(self) -> tuple[int, int, int]:
        totals = [row.bytes() for row in self.rows]
        return tuple(sum(column) for column in zip(*totals))

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order, repeats allowed (beam search)."""
        kept = [copy.copy(self.rows[row]) for row in rows.tolist()]
        for row in kept:
            row.select(torch.zeros(1, dtype=torch.long))
        self.rows, self.pads = kept, [self.pads[row] for row in rows.tolist()]
