"""One decoder layer of the quantized cache: a key stream and a value stream, filled where the attention function reads them."""

import copy

import torch
from torch import Tensor
from transformers import DynamicLayer

from kernels.attention import attend, merge
from kernels.prefill import attend_chunk
from kvq.errors import Refusal
from kvq.stream import RaggedStream, Stream

ATTENTIONS = ("auto", "reference", "fused")


class Handle:
    """Stands for a layer's keys or values between `update` and attention; a model that touches it fails loudly."""

    def __init__(self, layer: "QuantizedLayer"):
        self.layer = layer

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise Refusal("This model does not hand its cached keys and values to the registered attention function 'kvq'; it cannot be quantized.")


class QuantizedLayer(DynamicLayer):
    """One decoder layer: a key stream and a value stream."""

    is_croppable = False
    coded = slice(0, 2)  # the streams that are meant to be encoded

    def __init__(self, key_codec, value_codec, *, sink: int, window: int, prefill: str, memo: bool, rope=None, index: int = 0, attention: str = "reference"):
        super().__init__()
        self.codecs, self.sink, self.window, self.prefill, self.memo = (key_codec, value_codec), sink, window, prefill, memo
        self.rope, self.index, self.attention = rope, index, attention
        self.fused = fuse(key_codec, value_codec, rope, index) if attention == "fused" else None
        self._clear()

    def _clear(self) -> None:
        self.streams: list[Stream | RaggedStream] = []
        self.pads: list[int] = []
        self.count, self.cell, self._pending, self._raw = 0, 0, None, []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Take new keys (after RoPE) and values [B, H, T, D]; return handles for the attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._pending is not None:
            raise Refusal(f"Layer {self.index} was updated twice without attention: this model does not call the registered attention function.")
        self._pending = (key_states, value_states)
        self.count += key_states.shape[2]
        return Handle(self), Handle(self)

    def attend(self, query: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Encode the pending keys and values, return the whole of both in model precision."""
        key, value = self._pending
        self._pending = None
        positions = self._positions(position_ids, key.shape[0])
        if not self.streams:
            self._open(key, value, mask)
        return self._store(key, value, positions, query.shape[2])

    def reads_codes(self, query: Tensor) -> bool:
        """Whether `decode` serves this call; a first chunk opens the streams with `attend`."""
        return self.fused is not None and query.shape[2] == 1 and bool(self.streams)

    def decode(self, query: Tensor, position_ids: Tensor | None, scale: float) -> Tensor:
        """Encode the pending keys and values and attend with one query per row [B, Hq, 1, D], codes read as they lie; [B, 1, Hq, D]."""
        key, value = self._pending
        self._pending = None
        positions = self._positions(position_ids, key.shape[0])
        self._raw = None
        for stream, x in zip(self.streams, (key, value)):
            stream.append(x, positions)
        query = query[:, :, 0]
        if isinstance(self.streams[0], RaggedStream):
            rows = zip(query.split(1), *(stream.rows for stream in self.streams))
            output = torch.cat([self._merged(q, *pair, None, scale) for q, *pair in rows])
        else:
            first = torch.tensor(self.pads, device=query.device) if any(self.pads) else None
            output = self._merged(query, *self.streams, first, scale)
        return output[:, None].to(query.dtype)

    def _merged(self, query: Tensor, key: Stream, value: Stream, first: Tensor | None, scale: float) -> Tensor:
        common = min(key.encoded, value.encoded)
        parts = []
        if common:
            where, stretch = None, 1.0
            if key.turns:  # the kernel turns keys by pure rotations, so the factor of YaRN's tables goes into the scores
                where, stretch = key.positions[:, key.head.shape[2] :], self.rope.scaling(self.index)
            parts.append(self.fused.attend(query, key.held, value.held, common, scale=scale * stretch, first=first, positions=where))
        if key.length > common:
            rest = None if first is None else (first - common).clamp_min(0)
            parts.append(attend(query, key.beside(common), value.beside(common), scale, rest))
        return merge(parts)[0]

    def reads_chunks(self) -> bool:
        """Whether `attend_chunk` serves prompts. Where they are attended in full precision, or keys are coded before RoPE, none does."""
        return self.prefill == "quantized" and hasattr(self.fused, "attend_chunk")

    def attend_chunk(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Encode the pending keys and values and attend with their queries [B, Hq, C, D], codes read as they lie; [B, C, Hq, D]."""
        key, value = self._pending
        self._pending = None
        if not self.streams:
            self._open(key, value, mask)
        for stream, x in zip(self.streams, (key, value)):
            stream.append(x)
        if isinstance(self.streams[0], RaggedStream):
            rows = zip(query.split(1), *(stream.rows for stream in self.streams))
            output = torch.cat([self._chunk(q, *pair, None, scale) for q, *pair in rows])
        else:
            first = torch.tensor(self.pads, device=query.device) if any(self.pads) else None
            output = self._chunk(query, *self.streams, first, scale)
        return output.transpose(1, 2).to(query.dtype)

    def _chunk(self, query: Tensor, key: Stream, value: Stream, first: Tensor | None, scale: float) -> Tensor:
        common, sink = min(key.encoded, value.encoded), key.head.shape[2]
        at, parts = key.length - query.shape[2], []
        held = [stream.beside(common) for stream in (key, value)]
        for start, part in ((0, [x[:, :, :sink] for x in held]), (sink + common, [x[:, :, sink:] for x in held])):
            if part[0].shape[2]:
                parts.append(attend_chunk(query, *part, scale, at - start, None if first is None else first - start))
        if common:
            where = None if first is None else first - sink
            parts.append(self.fused.attend_chunk(query, key.held, value.held, common, at - sink, scale=scale, first=where))
        return merge(parts)[0]

    def _store(self, key: Tensor, value: Tensor, positions: Tensor | None, queries: int) -> tuple[Tensor, Tensor]:
        for stream, x in zip(self.streams, (key, value)):
            stream.append(x, positions)
        if self.prefill == "exact" and self._raw is not None:
            if queries > 1:
                self._raw.append((key, value))
                return tuple(torch.cat(parts, dim=2) for parts in zip(*self._raw))
            self._raw = None
        return self.streams[0].read(), self.streams[1].read()

    def _positions(self, position_ids: Tensor | None, batch: int) -> Tensor | None:
        if self.codecs[0].space != "pre":
            return None
        if position_ids is None:
            raise Refusal("Keys are coded before RoPE but the model passes no position_ids to attention; use a codec with space=post.")
        return position_ids.expand(batch, -1)

    def _open(self, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        batch = key.shape[0]
        self.cell = sum(x.shape[1] * x.shape[3] for x in (key, value))
        self.pads = _leading_pads(mask, batch)
        ragged = any(self.pads) and (self.sink or any(c.block > 1 or getattr(c, "stateful", False) for c in self.codecs))
        for index, codec in enumerate(self.codecs):
            turns = None
            if codec is self.codecs[0] and codec.space == "pre":
                turns = tuple(lambda x, p, f=f: f(x, p, self.index) for f in (self.rope.rotate, self.rope.unrotate))
            make = lambda codec=codec, turns=turns, index=index: Stream(codec, self.sink, self.window, *self._keeping(turns, index))  # noqa: E731
            self.streams.append(RaggedStream(make, self.pads) if ragged else make())

    def _keeping(self, turns, index: int) -> tuple:
        """(memo, turns, held) of a stream: kernels read codes, so beside them no decoded copy is kept."""
        return (False, turns, self.fused.held(index)) if self.fused else (self.memo, turns, None)

    def audit(self) -> dict[str, int]:
        """Counts and bytes. Raises RuntimeError unless encoded + exact == length in both streams."""
        for name, stream in zip(("keys", "values"), self.streams):
            if self._pending is not None or stream.length != self.count or stream.encoded + stream.exact != self.count:
                raise RuntimeError(
                    f"Layer {self.index}: {name} hold {stream.encoded} coded and {stream.exact} exact tokens of {self.count}; the run is not valid."
                )
        codes, exact, values = (sum(column) for column in zip(*(s.bytes() for s in self.streams)))
        tokens = sum(self.count - pad for pad in self.pads)
        padding = 0 if isinstance(self.streams[0], RaggedStream) else sum(self.pads)  # held like any token, or not at all
        return {
            "tokens": tokens,
            "encoded": min(_encoded_tokens(s, self.pads) for s in self.streams[self.coded]),
            "code_bytes": codes,
            "exact_bytes": exact,
            "coded_values": values,
            "slot_values": (tokens + padding) * self.cell,
        }

    def get_seq_length(self) -> int:
        return self.count

    def reset(self) -> None:
        self._clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("A quantized cache cannot be cropped: assisted and prompt-lookup decoding are not supported.")

    def offload(self) -> None:
        raise NotImplementedError("A quantized cache cannot be offloaded; codes are small, keep them on the device.")

    prefetch = offload

    def __copy__(self) -> "QuantizedLayer":
        """A layer that goes its own way: streams append to new tensors once rows are selected, codecs are shared."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, streams=[copy.copy(stream) for stream in self.streams], _raw=self._raw and list(self._raw))
        return twin

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for stream in self.streams:
            stream.select(indices)
        self._raw = self._raw and [tuple(x.index_select(0, indices.to(x.device)) for x in pair) for pair in self._raw]
        self.pads = [self.pads[i] for i in indices.tolist()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.streams:
            self.batch_select_indices(torch.arange(len(self.pads)).repeat_interleave(repeats))


def fuse(key_codec, value_codec, rope=None, index: int = 0):
    """What attends over packed codes of this pair: a key codec that has kernels offers `fuse(value codec)`. Raises Refusal if there is none.

    What it offers may still want the rotation of the layer (`unturned`), and refuse one that its kernel does not do.
    """
    pair = key_codec.fuse(value_codec) if hasattr(key_codec, "fuse") else None
    if getattr(pair, "unturned", False) and not pair.turn(*rope.pairs(index)):
        pair = None
    if pair is None:
        names = f"keys of {type(key_codec).__name__} and values of {type(value_codec).__name__} with these options"
        raise Refusal(f"attention=fused: no kernel reads {names} from packed codes; use attention=reference.")
    return pair


def _leading_pads(mask: Tensor | None, batch: int) -> list[int]:
    """Left padding per row, read off the mask of the first chunk: keys that its last query cannot see."""
    if mask is None:
        return [0] * batch
    seen = mask[:, 0, -1, :] if mask.dtype == torch.bool else mask[:, 0, -1, :] == 0
    if not bool(seen.any(dim=-1).all()):
        raise Refusal("The first prefill chunk of a row is all padding; use a larger chunk or batch rows of similar length.")
    return seen.int().argmax(dim=-1).expand(batch).tolist()


def _encoded_tokens(stream: Stream | RaggedStream, pads: list[int]) -> int:
    if isinstance(stream, RaggedStream):
        return sum(row.encoded for row in stream.rows)
    return sum(max(stream.encoded - pad, 0) for pad in pads)
