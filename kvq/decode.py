"""Decoding with nothing left on the host: one step of the whole model, its lengths on the device, fit for a CUDA graph.

A filled cache is taken over, coded or not, and gets room for the tokens to come: a :class:`kvq.cache.QuantizedCache` that was filled with
`attention="fused"`, whose codes the same kernels go on to read, or transformers' DynamicCache, which is read by SDPA with shared KV heads.
A step feeds the last token and appends the next, greedily. What a step needs lies in buffers that never move.
"""

import copy
import functools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, DynamicLayer

from kernels import backend, timing
from kernels.append import Turn
from kernels.encode import Encoder, encodable
from kernels.pages import PAGE, Pages
from kvq.cache import QuantizedCache
from kvq.errors import Refusal
from kvq.layer import Handle, QuantizedLayer
from kvq.stream import Stream


class Progress:
    """Where a decoder stands. lengths, after, first, pace [B] int32, at [1] and now [B, 1] int64 are on the device; `tokens` is what the host knows.

    lengths: tokens held; after: with the one being fed; first: left padding; at: where the new token goes; now: its positions; pace: 1, or 0 to repeat one step.
    """

    def __init__(self, rows: int, tokens: int, pads: list[int], steps: int, still: bool, device: torch.device):
        self.tokens, self.capacity = tokens, tokens + steps
        self.lengths = torch.full((rows,), tokens, dtype=torch.int32, device=device)
        self.after, self.at = self.lengths + 1, self.lengths[:1].long()
        self.first = torch.tensor(pads, dtype=torch.int32, device=device)
        self.pace = torch.full_like(self.lengths, int(not still))
        self.padded = any(pads)
        self.now, self.turned = self.lengths[:, None].long(), {}

    @functools.cached_property
    def positions(self) -> Tensor:
        """[B, capacity] of all tokens, one table for all layers."""
        return torch.arange(self.capacity, device=self.first.device) - self.first[:, None]

    def begin(self) -> Tensor:
        """Positions [B, 1] of the tokens being fed."""
        torch.add(self.lengths, 1, out=self.after)
        self.at.copy_(self.lengths[:1])
        torch.sub(self.lengths, self.first, out=self.now[:, 0])
        self.turned = {}
        return self.now

    def turn(self, rope, layer: int, gain: float) -> Turn:
        """What RoPE does to the tokens being fed in this layer; made once per step for all layers of its type."""
        kind = rope.layer_types[layer] if rope.layer_types else None
        if kind not in self.turned:
            self.turned[kind] = Turn(*(table[:, 0].contiguous() for table in rope.tables(self.now, layer)), gain)
        return self.turned[kind]

    def end(self) -> None:
        self.lengths += self.pace


class StepLayer(QuantizedLayer):
    """One layer of a decoder. `moves`: a graph of it serves every length; else the length is that of the moment of capture."""

    moves = False

    def __init__(self, layer, progress: Progress):
        self.__dict__.update(layer.__dict__)
        self.progress = progress

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        self.append(key_states, value_states)
        return Handle(self), Handle(self)

    def reads_codes(self, query: Tensor) -> bool:
        return True

    def get_seq_length(self) -> int:
        return self.progress.capacity  # only sizes a mask that no kernel reads

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.progress.capacity, 0

    def room(self, x: Tensor, block: int = 1) -> Tensor:
        """x [B, H, n, ...] at the beginning of a tensor with room for all tokens."""
        grown = x.new_zeros(*x.shape[:2], self.progress.capacity // block, *x.shape[3:])
        grown[:, :, : x.shape[2]] = x
        return grown

    def append(self, key: Tensor, value: Tensor) -> None:
        """Keep the new token's key (after RoPE) and value [B, H, 1, D]."""
        raise NotImplementedError

    def decode(self, query: Tensor, position_ids: Tensor | None, scale: float) -> Tensor:
        """Attention of query [B, Hq, 1, D] over everything held; [B, 1, Hq, D]."""
        raise NotImplementedError


class PagedStep(StepLayer):
    """Pages with room: one launch codes and appends, the kernels read up to device-side lengths."""

    moves = True

    def __init__(self, layer: QuantizedLayer, progress: Progress):
        super().__init__(layer, progress)
        self.held = [stream.held for stream in layer.streams]
        self.encoder, self.one = Encoder(*(pages.spec for pages in self.held)), torch.ones_like(progress.lengths)
        for pages in self.held:
            pages.reserve(-(-progress.capacity // PAGE), pages.words.shape[:2], pages.sides[:, 0, :, :0])

    def append(self, key: Tensor, value: Tensor) -> None:
        self.encoder.append(self.held, [key, value], self.progress.lengths, self.one)

    def decode(self, query: Tensor, position_ids: Tensor | None, scale: float) -> Tensor:
        p = self.progress
        output, _ = self.fused.launch(query[:, :, 0], *self.held, p.after, p.first, p.capacity, scale, dtype=query.dtype)
        return output[:, None]


class Room:
    """What a fused pair reads of a stream's codes: all that are in use."""

    def __init__(self, codes: dict[str, Tensor], progress: Progress):
        self.buffers, self.progress = codes, progress

    @property
    def codes(self) -> dict[str, Tensor]:
        return {name: leaf[:, :, : self.progress.tokens + 1] for name, leaf in self.buffers.items()}


class CodesStep(StepLayer):
    """Codes as the codec packs them (vector codes), one token each, read by the pair's kernel, and written by it in one launch where it can."""

    def __init__(self, layer: QuantizedLayer, progress: Progress):
        super().__init__(layer, progress)
        self.held = []
        for stream in layer.streams:  # one at a time, so that no two are held twice
            stream.held = Room({name: self.room(leaf) for name, leaf in stream.codes.items()}, progress)
            self.held.append(stream.held)
        self.write = getattr(self.fused, "append", None)
        self.early = layer.codecs[0].space == "pre"
        self.stretch = self.rope.scaling(self.index) if self.early else 1.0

    def append(self, key: Tensor, value: Tensor) -> None:
        if self.write is not None:
            turn = self.progress.turn(self.rope, self.index, self.stretch) if self.early else None
            self.write([held.buffers for held in self.held], (key, value), self.progress.at, turn)
            return
        if self.early:
            key = self.rope.unrotate(key, self.progress.now, self.index)
        for codec, held, x in zip(self.codecs, self.held, (key, value)):
            for name, leaf in codec.encode_unchecked(x).items():
                held.buffers[name].index_copy_(2, self.progress.at, leaf)

    def decode(self, query: Tensor, position_ids: Tensor | None, scale: float) -> Tensor:
        p = self.progress
        options = {"scale": scale * self.stretch, "first": p.first if p.padded else None, "positions": p.positions if self.early else None}
        output, _ = self.fused.attend(query[:, :, 0], *self.held, p.tokens + 1, **options)
        return output[:, None].to(query.dtype)


class ExactStep(StepLayer):
    """Keys and values as the model made them, read by SDPA without a mask and without copies of KV heads: FlashAttention where there is one."""

    def __init__(self, layer: DynamicLayer, progress: Progress):
        super().__init__(layer, progress)
        self._pending = None
        self.keys, self.values = self.room(layer.keys), self.room(layer.values)
        layer.keys = layer.values = None  # taken over, so that no layer is held twice

    def append(self, key: Tensor, value: Tensor) -> None:
        self.keys.index_copy_(2, self.progress.at, key)
        self.values.index_copy_(2, self.progress.at, value)

    def decode(self, query: Tensor, position_ids: Tensor | None, scale: float) -> Tensor:
        key, value = (x[:, :, : self.progress.tokens + 1] for x in (self.keys, self.values))
        return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=query.shape[1] != key.shape[1]).transpose(1, 2)


class Decoder:
    """Greedy decoding of `steps` more tokens at most after a filled cache, which is used up. `ids` [B, 1] holds the token to be fed next.

    still: every step is the one after the present tokens, for timing. route: what reads the cache. compiled: a `kvq.compiled.Step` that runs the
    model from the next step on, if set.
    """

    def __init__(self, model, cache: QuantizedCache | DynamicCache, ids: Tensor, steps: int, still: bool = False):
        """Raises Refusal unless every layer is held exactly, or coded alone and read by kernels."""
        kinds = [step_kind(layer, index) for index, layer in enumerate(cache.layers)]
        layers, exact = cache.layers, kinds[0] is ExactStep
        tokens, pads = (layers[0].get_seq_length(), [0] * len(ids)) if exact else (layers[0].count, layers[0].pads)
        self.model, self.ids, self.steps, self.taken, self.still = model, ids.clone(), steps, 0, still
        self.progress = Progress(len(ids), tokens, pads, steps, still, ids.device)
        self.cache = copy.copy(cache)
        self.cache.layers = [kind(layer, self.progress) for kind, layer in zip(kinds, layers)]
        self.open = torch.ones(len(ids), 1, 1, 1, dtype=torch.bool, device=ids.device)  # a mask made beforehand, which no layer reads
        self.moves = all(kind.moves for kind in kinds)
        self.route = "sdpa" if exact else "kernels" if ids.is_cuda else "interpreter" if backend.INTERPRET and kinds[0] is PagedStep else "definition"
        self.graph = self.logits = self.compiled = None

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Logits [B, V] of the token at `ids`, which the likeliest next one replaces. Raises Refusal when the room is used up."""
        if self.taken == self.steps:
            raise Refusal(f"The decoder was given room for {self.steps} tokens; make it with more steps.")
        if self.graph is None:
            logits = self._step()
        else:
            self.graph.replay()
            logits = self.logits
        if not self.still:
            self.taken += 1
            self.progress.tokens += 1
        return logits

    def _step(self) -> Tensor:
        positions = self.progress.begin()
        if self.compiled is None:
            logits = self.model(self.ids, attention_mask=self.open, position_ids=positions, past_key_values=self.cache, use_cache=True).logits[:, -1]
        else:
            logits = self.compiled(self.cache.layers, self.ids, self.open, positions)
        self.ids.copy_(logits.argmax(-1, keepdim=True))
        self.progress.end()
        return logits

    @torch.inference_mode()
    def capture(self, warm: int = 3) -> None:
        """Record one step as a CUDA graph; `warm` steps compile the kernels first and are undone.

        Raises Refusal where a graph would go on reading the present length only, unless the decoder stands still.
        """
        if not (self.moves or self.still):
            raise Refusal(f"A graph of the route '{self.route}' serves the length at which it was captured; decode step by step, or make the decoder with still=True to time it.")
        ids, lengths = self.ids.clone(), self.progress.lengths.clone()

        def once() -> Tensor:
            self.ids.copy_(ids)
            self.progress.lengths.copy_(lengths)
            return self._step()

        for _ in range(warm):
            once()
        self.ids.copy_(ids)
        self.progress.lengths.copy_(lengths)
        self.graph, self.logits = timing.capture(self._step, warm=0)


def step_kind(layer, index: int) -> type[StepLayer]:
    """How a decoder takes over this layer of a filled cache. Raises Refusal where it cannot."""
    if type(layer) is DynamicLayer and layer.is_initialized:
        return ExactStep
    if not isinstance(layer, QuantizedLayer) or not layer.streams:
        raise Refusal(f"Layer {index} is neither quantized nor full attention, or holds no token; a decoder needs a filled cache without sliding windows.")
    if layer.fused is None:
        raise Refusal(f"Layer {index} is not read by a kernel; use attention=fused with a quantizer that has one.")
    if any(stream.exact for stream in layer.streams):
        raise Refusal(f"Layer {index} keeps exact tokens; a graphed decoder needs quant.sink=0 and quant.window=0.")
    held = [getattr(stream, "held", None) for stream in layer.streams]
    if all(isinstance(pages, Pages) and encodable(pages.spec) for pages in held):
        return PagedStep
    alone = all(hasattr(codec, "encode_unchecked") and codec.block == 1 for codec in layer.codecs)
    if alone and all(isinstance(stream, Stream) and not isinstance(stream.held, Pages) for stream in layer.streams):
        return CodesStep
    raise Refusal(f"Layer {index} is held neither in pages that the encoding kernel serves nor as codes of single tokens; decode with generate.")
