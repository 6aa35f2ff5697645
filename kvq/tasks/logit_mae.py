"""How far key quantization moves the logits: mean absolute RoPE logit error over relative offsets, per layer and KV head (Block-GTQ Tables 1, 11).

Keys only, values untouched, no exact window. Calibration and measurement use different texts. The formula is named in YAML
(`blockgtq.diagnose.logit_mae`), so that this task serves any method and imports none.
"""

from collections.abc import Callable, Iterator

import torch

from kvq.probe import Probe, keys_before_rope, rope_of
from kvq.records import Example, Record


class LogitMAE(Probe):
    """mae(q, k, k_hat, pairs, inv_freq, offsets) -> [H]: tokens of all windows together, `offsets` evenly spaced in [-reach, reach]."""

    metric = "logit_mae"

    def __init__(self, mae: Callable, offsets: int, reach: int, **text):
        super().__init__(**text)
        self.mae, self.offsets = mae, torch.linspace(-reach, reach, offsets)

    @torch.no_grad()
    def run(self, lm, examples: list[Example]) -> Iterator[Record]:
        rope = rope_of(lm)
        for seen in self.activations(lm, sorted({e.payload[0] for e in examples})):
            q, k, k_hat = (x.transpose(0, 1).flatten(1, 2) for x in keys_before_rope(lm, seen))
            pairs, inv_freq = (t.to(q.device) for t in rope.pairs(seen.layer))
            error = self.mae(q, k, k_hat, pairs, inv_freq, self.offsets.to(q.device))
            for example in examples:
                layer, head = example.payload
                if layer == seen.layer:
                    yield {"id": example.id, "subset": example.subset, "metrics": {"logit_mae": float(error[head])}, "layer": layer, "head": head}
