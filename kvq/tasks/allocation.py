"""Which widths a key codec gives its RoPE blocks: histogram, entropy, groups, and the distance to the allocation of a reference text.

Block-GTQ Tables 8 to 10, 16 and 17, Figures 1, 3, 7 and 8. A codec without widths of its own counts as uniform at its whole stored bits, so
the regret of a uniform code is in the same table. Formulas are named in YAML (`blockgtq.diagnose`, `blockgtq.allocate`).
"""

from collections.abc import Callable, Iterator

import torch

from kvq import calibrate
from kvq.probe import Probe, reconstruct, rope_of
from kvq.records import Example, Record


class Allocation(Probe):
    """scores(keys, queries, pairs, score) -> [H, L], energies(x, pairs) -> [H, L], allocate(scores, budget) -> [H, L],
    compare(widths, reference, scores) -> dict: named functions. The task's own text is the reference text; `score` its score."""

    metric = "regret"

    def __init__(self, scores: Callable, energies: Callable, allocate: Callable, compare: Callable, summary: Callable, score: str, **text):
        super().__init__(**text)
        self.functions, self.score = (scores, energies, allocate, compare, summary), score

    def check(self) -> None:
        self.content = calibrate.content(self.source)

    def parts(self, lm) -> list[str]:
        return ["key"]

    @torch.no_grad()
    def run(self, lm, examples: list[Example]) -> Iterator[Record]:
        scores, energies, allocate, compare, summary = self.functions
        rope = rope_of(lm)
        for seen in self.activations(lm, sorted({e.payload[0] for e in examples})):
            codec = lm.codecs[seen.layer][0]
            reconstruct(lm, codec, seen.key[:1, :, :64], seen.positions[:1, :64], seen.layer, "key")
            key, query = (x.transpose(0, 1).flatten(1, 2).cpu() for x in (seen.key, seen.query))
            pairs = rope.pairs(seen.layer)[0]
            heads, blocks = key.shape[0], len(pairs)
            own = getattr(codec, "widths", None)  # the static blocks of channels that RoPE leaves alone stay out
            widths = torch.full((heads, blocks), int(codec.bits)) if own is None else own.long().cpu()[:, :blocks]
            reference_scores = scores(key, query, pairs, self.score)
            budgets = widths.sum(1).clamp(blocks, 8 * blocks).tolist()
            reference = torch.cat([allocate(row[None], budget) for row, budget in zip(reference_scores, budgets)])
            group = query.shape[0] // heads
            record = {
                "metrics": {**summary(widths), **compare(widths, reference, reference_scores)}, "layer": seen.layer, "widths": widths.tolist(),
                "key_energy": energies(key, pairs).tolist(), "query_energy": energies(query, pairs).unflatten(0, (heads, group)).mean(1).tolist(),
            }  # fmt: skip
            yield from ({"id": e.id, "subset": e.subset, **record} for e in examples if e.payload[0] == seen.layer)
