"""How unevenly the loss weighs vectors, before and after the logarithm (GSRQ Figure 3), and a codec's error under each weight.

Norms of the loss gradient per piece of `group` channels, divided by the median of their layer, tensor and piece. Quantiles are
over all vectors of a layer; raw and log are both in units of their own median.
"""

from collections.abc import Callable, Iterator

import torch

from kvq.cache import coded_shapes
from kvq.probe import Probe, reconstruct
from kvq.records import Example, Record

LEVELS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)


class Gradients(Probe):
    """weights(norms [M, N], tau) -> [M, N]: the smoothed weights. group: channels of one vector, null for a head."""

    metric = "error_log"

    def __init__(self, weights: Callable, tau: float, group: int | None, **text):
        super().__init__(**text)
        self.weights, self.tau, self.group = weights, tau, group

    def parts(self, lm) -> list[str]:
        return list(coded_shapes(lm.model.config))

    def subset(self, layer: int, part: str) -> str:
        return part

    def run(self, lm, examples: list[Example]) -> Iterator[Record]:
        group = self.group or coded_shapes(lm.model.config)["key"][1]
        for seen in self.activations(lm, sorted({e.payload[0] for e in examples}), group=group):
            for example in examples:
                layer, kind = example.payload
                if layer == seen.layer:
                    yield {"id": example.id, "subset": kind, "metrics": self._measure(lm, seen, kind, group), "layer": layer}

    @torch.no_grad()
    def _measure(self, lm, seen, kind: str, group: int) -> dict[str, float]:
        which = int(kind == "value")
        norms = seen.grads[which].sqrt().T  # [M, N]: the model's forward covers B * T vectors of H * D // group pieces
        space, rebuilt = reconstruct(lm, lm.codecs[seen.layer][which], getattr(seen, kind), seen.positions, seen.layer, kind)
        x, error = (t.transpose(1, 2).flatten(2).flatten(0, 1).unflatten(-1, (-1, group)).square().sum(-1).T.cpu() for t in (space, space - rebuilt))
        metrics = {}
        for name, weight in (("none", torch.ones_like(norms)), ("raw", norms), ("log", self.weights(norms, self.tau))):
            metrics[f"error_{name}"] = float((weight * error).sum() / (weight * x).sum())
            if name != "none":
                scaled = (weight / weight.median(1, keepdim=True).values.clamp_min(1e-30)).double().flatten()
                metrics |= {f"{name}/{level:g}": float(torch.quantile(scaled, level)) for level in LEVELS}
        return metrics
