"""Decoding with nothing left on the host: one step of the whole model over packed codes, its lengths on the device, fit for a CUDA graph.

A cache that was filled with `attention="fused"` is taken over: its pages get room for the tokens to come, each layer's new key and value are
coded by one launch and read with the others by the kernels. A step feeds the last token and appends the next, greedily.
"""

import copy

import torch
from torch import Tensor

from kernels.encode import Encoder, encodable
from kernels.pages import PAGE, Pages
from kvq.cache import QuantizedCache
from kvq.errors import Refusal
from kvq.layer import Handle, QuantizedLayer


class StepLayer(QuantizedLayer):
    """One layer of a decoder: pages with room, shared device-side lengths, no exact tokens."""

    def __init__(self, layer: QuantizedLayer, lengths: Tensor, first: Tensor, capacity: int):
        held = [getattr(stream, "held", None) for stream in layer.streams]
        if not all(isinstance(pages, Pages) and encodable(pages.spec) for pages in held):
            raise Refusal(f"Layer {layer.index} is not held in pages that the encoding kernel serves; use attention=fused with Block-GTQ or TurboQuant-MSE.")
        if any(stream.exact for stream in layer.streams):
            raise Refusal(f"Layer {layer.index} keeps exact tokens; a graphed decoder needs quant.sink=0 and quant.window=0.")
        self.__dict__.update(layer.__dict__)
        self.held, self.lengths, self.first, self.capacity = held, lengths, first, capacity
        self.encoder, self.one = Encoder(*(pages.spec for pages in held)), torch.ones_like(lengths)
        for pages in held:
            pages.reserve(-(-capacity // PAGE), pages.words.shape[:2], pages.sides[:, 0, :, :0])

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        self.encoder.append(self.held, [key_states, value_states], self.lengths, self.one)
        return Handle(self), Handle(self)

    def reads_codes(self, query: Tensor) -> bool:
        return True

    def decode(self, query: Tensor, position_ids: Tensor | None, scale: float) -> Tensor:
        output, _ = self.fused.launch(query[:, :, 0], *self.held, self.lengths + self.one, self.first, self.capacity, scale)
        return output[:, None].to(query.dtype)

    def get_seq_length(self) -> int:
        return self.capacity  # only sizes a mask that no kernel reads

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.capacity, 0


class Decoder:
    """Greedy decoding of `steps` more tokens at most after a prefilled cache. `ids` [B, 1] holds the token to be fed next."""

    def __init__(self, model, cache: QuantizedCache, ids: Tensor, steps: int):
        """Raises Refusal unless every layer of the cache is quantized, held in pages and free of exact tokens."""
        layers = cache.quantized_layers
        if len(layers) != len(cache.layers) or not all(layer.streams for layer in layers):
            raise Refusal("A graphed decoder needs a filled cache in which every layer is quantized.")
        tokens, device = layers[0].count, ids.device
        self.model, self.ids, self.steps, self.taken = model, ids.clone(), steps, 0
        self.lengths = torch.full((len(ids),), tokens, dtype=torch.int32, device=device)
        self.first = torch.tensor(layers[0].pads, dtype=torch.int32, device=device)
        self.cache = copy.copy(cache)
        self.cache.layers = [StepLayer(layer, self.lengths, self.first, tokens + steps) for layer in layers]
        self.graph = None

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Logits [B, V] of the token at `ids`, which the likeliest next one replaces. Raises Refusal when the room is used up."""
        if self.taken == self.steps:
            raise Refusal(f"The decoder was given room for {self.steps} tokens; make it with more steps.")
        self.taken += 1
        if self.graph is None:
            return self._step()
        self.graph.replay()
        return self.logits

    def _step(self) -> Tensor:
        positions = (self.lengths - self.first)[:, None].long()
        logits = self.model(self.ids, position_ids=positions, past_key_values=self.cache, use_cache=True).logits[:, -1]
        self.ids.copy_(logits.argmax(-1, keepdim=True))
        self.lengths += 1
        return logits

    @torch.inference_mode()
    def capture(self, warm: int = 3) -> None:
        """Record one step as a CUDA graph; `warm` steps compile the kernels first and are undone."""
        ids, lengths = self.ids.clone(), self.lengths.clone()

        def undo():
            self.ids.copy_(ids)
            self.lengths.copy_(lengths)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(warm):
                self._step()
                undo()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self._step()
        self.graph = graph
        undo()
