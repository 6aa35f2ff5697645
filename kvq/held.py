"""Codes that grow in place: appending a token writes that token, it does not copy the tokens before it."""

from torch import Tensor

from kvq.quantizer import Codes, code_bytes, select


class Held:
    """The codes of one stream, in buffers that double when they are full; axis 2 of every leaf is time.

    A kernel's own order of the same bits is another class with the same five members (see `kernels.pages.Pages`).
    """

    def __init__(self):
        self._buffers: Codes = {}
        self._counts: dict[str, int] = {}

    def encode(self, x: Tensor) -> bool:
        """Code tokens x [B, H, T, D] behind those held, equal to the codec's codes; False, and nothing done, where that is left to the codec: here always."""
        return False

    def append(self, codes: Codes) -> None:
        """Write `codes` after those held."""
        for name, leaf in codes.items():
            start = self._counts.get(name, 0)
            end = start + leaf.shape[2]
            if name not in self._buffers or end > self._buffers[name].shape[2]:
                grown = leaf.new_empty(*leaf.shape[:2], max(end, 2 * start), *leaf.shape[3:])
                if start:
                    grown[:, :, :start] = self._buffers[name][:, :, :start]
                self._buffers[name] = grown
            self._buffers[name][:, :, start:end] = leaf
            self._counts[name] = end

    @property
    def codes(self) -> Codes:
        """All codes appended so far, as the codec made them; views, no copy."""
        return {name: buffer[:, :, : self._counts[name]] for name, buffer in self._buffers.items()}

    def bytes(self) -> int:
        """Bytes of the codes held, room to grow not counted."""
        return code_bytes(self.codes)

    def select(self, rows: Tensor) -> "Held":
        """The same for these batch rows, in this order, repeats allowed; what is appended to one does not reach the other."""
        twin = Held()
        twin._buffers, twin._counts = select(self.codes, rows), dict(self._counts)
        return twin
