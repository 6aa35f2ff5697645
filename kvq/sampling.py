"""Sampling with one random stream per row: a draw depends on its seed and the logits alone, not on the batch, the device or a restart.

transformers draws all rows of a batch from the global generator, so a resumed or re-batched run would sample other texts. Here the
token is chosen in a logits processor and generation itself runs greedily; the global generators are never touched.
"""

import hashlib

import torch
from torch import Tensor
from transformers import LogitsProcessor


def seed_of(*parts) -> int:
    """A 63-bit seed from names and numbers."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


class Sampler(LogitsProcessor):
    """Temperature, then top-p (the smallest set of tokens whose probability reaches it), then one uniform number per row and token.

    seeds: one per row of the batch. The chosen token keeps score 0 and all others become -inf.
    """

    def __init__(self, temperature: float, top_p: float, seeds: list[int]):
        self.temperature, self.top_p = temperature, top_p
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, V] logits."""
        ordered, tokens = (scores.float() / self.temperature).sort(dim=-1, descending=True)
        mass = ordered.softmax(-1).double().cumsum(-1)  # double: float32 sums over a large vocabulary drift by more than rare tokens weigh
        kept = (mass < self.top_p).sum(-1, keepdim=True).clamp_max(mass.shape[-1] - 1)  # the last token of the set
        drawn = torch.stack([torch.rand(1, generator=stream, dtype=torch.float64) for stream in self.streams]).to(mass.device)
        place = torch.searchsorted(mass, drawn * mass.gather(-1, kept), right=True).clamp_max(kept)
        return torch.full_like(scores, float("-inf")).scatter(-1, tokens.gather(-1, place), 0.0)
