"""What the diagnostics share: the fp16 model's activations on a text, a few layers at a time, put through each layer's codecs once.

A diagnostic compares tensors, not scores: it needs no cache and no generated token, and memory for as many layers as `memory_gb` holds.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvq import calibrate
from kvq.cache import coded_shapes, layer_kinds
from kvq.errors import Refusal
from kvq.quantizer import code_bytes
from kvq.record import record
from kvq.records import Example
from kvq.rope import Rope

SOURCES = {"embedded": "standin:heldout", "hub": "hub:wikitext:wikitext-2-raw-v1:test"}


@dataclass
class Seen:
    """One layer on `samples` windows: key, value [B, H, T, D] and query [B, Hq, T, D], after RoPE; positions [B, T].

    grads: squared loss gradients (keys, values), each [B * T, H * D // group], or Nones.
    """

    layer: int
    key: Tensor
    value: Tensor
    query: Tensor
    positions: Tensor
    grads: tuple[Tensor | None, Tensor | None]


class Probe:
    """A diagnostic task. data: `embedded`, `hub`, a text file or hub:<dataset>:<config>:<split>. limit: layers, null for all.

    samples windows of `context` tokens, from token `offset` of the text.
    """

    one_pass = True

    def __init__(self, data: str, limit: int | None, subsets: None, context: int, samples: int, batch_size: int, offset: int = 0, memory_gb: float = 8, seed: int = 0):
        if subsets:
            raise Refusal(f"{type(self).__name__} has no subsets; drop task.subsets.")
        for name, number, least in (("limit", limit, 1), ("context", context, 2), ("samples", samples, 1), ("batch_size", batch_size, 1), ("offset", offset, 0)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < least):
                raise Refusal(f"task.{name}={number} must be a whole number of at least {least}.")
        self.data, self.source, self.limit, self.context, self.samples = data, SOURCES.get(data, data), limit, context, samples
        self.batch_size, self.offset, self.memory_gb = batch_size, offset, memory_gb

    def check(self) -> None:
        """Fingerprint the text before a model is loaded. Raises Refusal if there is none."""
        self.content = calibrate.content(self.source)

    def layers(self, lm) -> list[int]:
        """Full-attention layers, at most `limit`. Raises Refusal if a window is longer than the model allows."""
        if self.context > lm.max_length:
            raise Refusal(f"task.context={self.context} is longer than {lm.name} allows ({lm.max_length}).")
        full = [index for index, (kind, _) in enumerate(layer_kinds(lm.model.config)) if kind == "full_attention"]
        return full[: self.limit]

    def examples(self, lm) -> list[Example]:
        """One example per layer and part; payload (layer, part)."""
        return [Example(f"{layer}/{part}", self.subset(layer, part), (layer, part)) for layer in self.layers(lm) for part in self.parts(lm)]

    def parts(self, lm) -> list:
        """What is measured apart in each layer: the KV heads."""
        return list(range(coded_shapes(lm.model.config)["key"][0]))

    def subset(self, layer: int, part) -> str:
        return f"layer {layer}"

    def activations(self, lm, layers: list[int], source: str | None = None, offset: int | None = None, group: int | None = None) -> Iterator[Seen]:
        """Layers in order, on `source` (the task's own text if None); gradients over groups of `group` channels if given."""
        windows = calibrate.windows(lm.tokenizer, source or self.source, self.samples, self.context, self.offset if offset is None else offset)
        config = lm.model.config.get_text_config(decoder=True)
        width = sum(heads * dim for heads, dim in coded_shapes(lm.model.config).values()) * 2 + config.hidden_size
        step = max(1, int(self.memory_gb * 2**30 / (self.samples * self.context * width * 4)))
        for start in range(0, len(layers), step):
            some, batches = layers[start : start + step], []
            groups = [(group, group) if index in some else (None, None) for index in range(config.num_hidden_layers)]
            with torch.set_grad_enabled(group is not None):
                for slots in record(lm.model, windows, some, groups, None, self.batch_size):
                    batches.append({slot.index: (*slot.seen, slot.positions, *slot.grads) for slot in slots if slot.wanted})
            for layer in some:
                parts = zip(*(batch.pop(layer) for batch in batches))
                key, value, query, positions, *grads = (None if part[0] is None else torch.cat(part) for part in parts)
                yield Seen(layer, key, value, query, positions, tuple(grads))


def rope_of(lm) -> Rope:
    return lm.rope or Rope(lm.model)


def reconstruct(lm, codec, x: Tensor, positions: Tensor, layer: int, kind: str) -> tuple[Tensor, Tensor]:
    """(x, x_hat) [B, H, T, D] float32 in the codec's own space, x being after RoPE; tokens behind the last whole block stay exact."""
    space = rope_of(lm).unrotate(x, positions, layer) if kind == "key" and codec.space == "pre" else x.float()
    whole = space.shape[2] - space.shape[2] % codec.block
    codes = codec.encode(space[:, :, :whole], {}) if getattr(codec, "stateful", False) else codec.encode(space[:, :, :whole])
    values = space[:, :, :whole].numel()
    account = {
        "tokens": x.shape[0] * x.shape[2], "encoded": x.shape[0] * whole, "code_bytes": code_bytes(codes), "coded_values": values, "exact_bytes": 0,
        "slot_values": space.numel(), "table_bytes": sum(b.numel() * b.element_size() for b in codec.buffers()),
    }  # fmt: skip
    for name, amount in account.items():
        lm.book(name, amount)
    return space, torch.cat([codec.decode(codes), space[:, :, whole:]], dim=2)


def keys_before_rope(lm, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, k_hat) before RoPE, [B, heads, T, D] float32, the layer's keys through its key codec."""
    rope, codec = rope_of(lm), lm.codecs[seen.layer][0]
    q, k = (rope.unrotate(x, seen.positions, seen.layer) for x in (seen.query, seen.key))
    _, decoded = reconstruct(lm, codec, seen.key, seen.positions, seen.layer, "key")
    return q, k, decoded if codec.space == "pre" else rope.unrotate(decoded, seen.positions, seen.layer)
