"""How well a codec rebuilds keys and values, stage by stage, on the text it learned from and on held-out text (GSRQ Figures 2 and 5).

Per stage: what it was given (the original, then residuals) against the entry it chose. A codec that shows its stages has
`trace(x) -> (input, entry, codes)` per stage over pieces; any other codec is one stage over heads.

mse         mean squared error per element of what the stage was given, relative: divided by the energy of the original
captured    1 - mse / energy of the stage's input; for means of clusters this is the occupancy-weighted ratio of squared norms that
            GSRQ calls shrinkage (E||x - mu||^2 = E||x||^2 - E||mu||^2), so a low ratio is the distortion and not its cause
gain_error  mean | ||x|| - ||entry|| |, in the units of the activations
cosine      mean cosine of input and entry; entropy: of the codes, in bits
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvq import calibrate
from kvq.cache import coded_shapes
from kvq.errors import Refusal
from kvq.probe import Probe, reconstruct
from kvq.records import Example, Record


class Reconstruction(Probe):
    """train: source, offset, samples and length of the calibration (conf/task/reconstruction.yaml reads them off calib); null: held out only."""

    metric = "relative"

    def __init__(self, train: dict | None, **text):
        super().__init__(**text)
        tokens = train["samples"] * train["length"] if train else None
        if train and tokens < self.samples * self.context:
            raise Refusal(f"task.samples * task.context = {self.samples * self.context} is more than the {tokens} tokens calibrated on; lower one or set task.train=null.")
        self.train = train

    def check(self) -> None:
        super().check()
        if self.train:
            self.content += " " + calibrate.content(self.train["source"])

    def parts(self, lm) -> list[str]:
        return [f"{kind} {split}" for kind in coded_shapes(lm.model.config) for split in (["train"] if self.train else []) + ["heldout"]]

    def subset(self, layer: int, part: str) -> str:
        return part

    @torch.no_grad()
    def run(self, lm, examples: list[Example]) -> Iterator[Record]:
        for split, text in (("train", {"source": self.train["source"], "offset": self.train["offset"]} if self.train else None), ("heldout", {})):
            wanted = [e for e in examples if e.subset.endswith(split)]
            for seen in self.activations(lm, sorted({e.payload[0] for e in wanted}), **text) if wanted else ():
                for example in wanted:
                    if example.payload[0] == seen.layer:
                        kind = example.subset.split()[0]
                        yield {"id": example.id, "subset": example.subset, "metrics": self._measure(lm, seen, kind), "layer": seen.layer}

    def _measure(self, lm, seen, kind: str) -> dict[str, float]:
        codec = lm.codecs[seen.layer][kind == "value"]
        x = getattr(seen, kind)
        space, rebuilt = reconstruct(lm, codec, x, seen.positions, seen.layer, kind)
        energy = space.square().mean()
        metrics = {"relative": float((space - rebuilt).square().mean() / energy)}
        heads = tuple(t.transpose(0, 1).flatten(1, 2) for t in (space, rebuilt))
        traced = codec.trace(space) if hasattr(codec, "trace") else [(*heads, None)]
        for stage, (given, entry, codes) in enumerate(traced, start=1):
            metrics |= {f"{name}/{stage}": value for name, value in stage_metrics(given, entry, codes, energy).items()}
        return metrics


def stage_metrics(given: Tensor, entry: Tensor, codes: Tensor | None, energy: Tensor) -> dict[str, float]:
    """Metrics of one stage: given, entry [M, N, D]; codes [M, N] or None; energy: mean square of the original, []."""
    error = (given - entry).square().mean()
    found = {
        "mse": error / energy, "error": error, "captured": 1 - error / given.square().mean().clamp_min(1e-30),
        "gain_error": (given.norm(dim=-1) - entry.norm(dim=-1)).abs().mean(),
        "cosine": torch.nn.functional.cosine_similarity(given, entry, dim=-1).mean(),
    }  # fmt: skip
    if codes is not None:
        share = [torch.bincount(row).double() / row.numel() for row in codes]
        found["entropy"] = -sum((p * p.clamp_min(1e-300).log2()).sum() for p in share) / len(share)
    return {name: float(value) for name, value in found.items()}
