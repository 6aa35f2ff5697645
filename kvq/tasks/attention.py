"""What key quantization does to attention: softmax KL and top-10 overlap per layer and KV head, full causal prefixes (Block-GTQ Tables 12, 13).

Keys only, values untouched, no exact window. The formula is named in YAML (`blockgtq.diagnose.attention_kl_topk`).
"""

from collections.abc import Callable, Iterator

import torch

from kvq.errors import Refusal
from kvq.probe import Probe, keys_before_rope, rope_of
from kvq.records import Example, Record


class Attention(Probe):
    """divergence(q, k, k_hat, pairs, inv_freq, queries, top) -> (KL(p || p_hat) in nats [H], overlap [H]) of one window; windows are averaged."""

    metric = "kl"

    def __init__(self, divergence: Callable, queries: int, top: int, **text):
        super().__init__(**text)
        if queries + top > self.context:
            raise Refusal(f"task.context={self.context} is too short for {queries} query positions that see at least {top} keys each; lower task.queries.")
        self.divergence, self.queries, self.top = divergence, queries, top

    @torch.no_grad()
    def run(self, lm, examples: list[Example]) -> Iterator[Record]:
        rope = rope_of(lm)
        for seen in self.activations(lm, sorted({e.payload[0] for e in examples})):
            pairs, inv_freq = (t.to(seen.key.device) for t in rope.pairs(seen.layer))
            windows = [self.divergence(*x, pairs, inv_freq, queries=self.queries, top=self.top) for x in zip(*keys_before_rope(lm, seen))]
            kl, overlap = (torch.stack(v).mean(0) for v in zip(*windows))
            for example in examples:
                layer, head = example.payload
                if layer == seen.layer:
                    metrics = {"kl": float(kl[head]), "top10": float(overlap[head])}
                    yield {"id": example.id, "subset": example.subset, "metrics": metrics, "layer": layer, "head": head}
