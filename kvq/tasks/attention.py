"""What key quantization does to attention, layer by layer and head by head: RoPE logit error, softmax KL, top-10 overlap (Block-GTQ).

Keys only, values untouched, no exact window: the text passes through the fp16 model, each layer's keys go through the layer's key codec
once, and queries and keys are compared before RoPE at relative offsets. One layer is in memory at a time. The formulas are named in
YAML (`blockgtq.diagnose`), so that this task serves any method and imports none.
"""

from collections.abc import Callable, Iterator

import torch

from kvq import calibrate
from kvq.errors import Refusal
from kvq.quantizer import code_bytes
from kvq.record import record
from kvq.records import Example, Record
from kvq.rope import Rope

SOURCES = {"embedded": "standin:heldout", "hub": "hub:wikitext:wikitext-2-raw-v1:test"}


class Attention:
    """data: `embedded`, `hub`, a text file or hub:<dataset>:<config>:<split>. context: tokens of the one sample. limit: layers, null for all.

    mae(q, k, k_hat, pairs, inv_freq, offsets) -> [H]; divergence(..., queries, top) -> (KL [H], overlap [H]).
    """

    one_pass = True
    metric = "logit_mae"

    def __init__(
        self, data: str, limit: int | None, subsets: list[str] | None, context: int, batch_size: int, mae: Callable, divergence: Callable,
        offsets: int, reach: int, queries: int, top: int, seed: int = 0,
    ):  # fmt: skip
        if subsets:
            raise Refusal("attention has no subsets; drop task.subsets.")
        if queries + top > context:
            raise Refusal(f"task.context={context} is too short for {queries} query positions that see at least {top} keys each; lower task.queries.")
        self.data, self.source, self.limit, self.context = data, SOURCES.get(data, data), limit, context
        self.mae, self.divergence, self.queries, self.top = mae, divergence, queries, top
        self.offsets = torch.linspace(-reach, reach, offsets)

    def examples(self, lm) -> list[Example]:
        config = lm.model.config.get_text_config(decoder=True)
        if self.context > lm.max_length:
            raise Refusal(f"task.context={self.context} is longer than {lm.name} allows ({lm.max_length}).")
        layers = config.num_hidden_layers if self.limit is None else min(self.limit, config.num_hidden_layers)
        return [Example(f"{layer}/{head}", f"layer {layer}", (layer, head)) for layer in range(layers) for head in range(config.num_key_value_heads)]

    @torch.no_grad()
    def run(self, lm, examples: list[Example]) -> Iterator[Record]:
        rope = lm.rope or Rope(lm.model)
        sample = calibrate.windows(lm.tokenizer, self.source, 1, self.context)
        for layer in sorted({e.payload[0] for e in examples}):
            scores = self._layer(lm, rope, sample, layer)
            for example in examples:
                if example.payload[0] == layer:
                    head = example.payload[1]
                    yield {"id": example.id, "subset": example.subset, "metrics": {k: float(v[head]) for k, v in scores.items()}, "head": head}

    def _layer(self, lm, rope: Rope, sample, layer: int) -> dict[str, torch.Tensor]:
        groups = [(None, None)] * lm.model.config.get_text_config(decoder=True).num_hidden_layers
        slots = next(record(lm.model, sample, range(layer, layer + 1), groups, rope))
        if not slots:
            raise Refusal(f"Layer {layer} is not a full-attention layer; attention diagnostics need one.")
        key, _, query = slots[0].seen
        positions = slots[0].positions
        codec = lm.codecs[layer][0]
        q, k = (rope.unrotate(x, positions, layer) for x in (query, key))
        x = k if codec.space == "pre" else key.float()
        whole = x.shape[2] - x.shape[2] % codec.block
        codes = codec.encode(x[:, :, :whole], {}) if getattr(codec, "stateful", False) else codec.encode(x[:, :, :whole])
        decoded = torch.cat([codec.decode(codes), x[:, :, whole:]], dim=2)
        k_hat = decoded if codec.space == "pre" else rope.unrotate(decoded, positions, layer)
        for name, amount in (("tokens", x.shape[2]), ("encoded", whole), ("code_bytes", code_bytes(codes)), ("coded_values", x[:, :, :whole].numel()),
                             ("exact_bytes", 0), ("slot_values", x.numel()), ("table_bytes", sum(b.numel() * b.element_size() for b in codec.buffers()))):  # fmt: skip
            lm.book(name, amount)
        pairs, inv_freq = (t.to(q.device) for t in rope.pairs(layer))
        mae = self.mae(q[0], k[0], k_hat[0], pairs, inv_freq, self.offsets.to(q.device))
        kl, overlap = self.divergence(q[0], k[0], k_hat[0], pairs, inv_freq, queries=self.queries, top=self.top)
        return {"logit_mae": mae, "kl": kl, "top10": overlap}
