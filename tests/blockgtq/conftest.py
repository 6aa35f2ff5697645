"""Synthetic calibrations: keys and queries whose RoPE blocks have very different energies."""

from types import SimpleNamespace

import pytest
import torch


def half_pairs(dim, rotary=None):
    """Pairs (i, i + L) of the first `rotary` channels."""
    blocks = (rotary or dim) // 2
    return torch.stack([torch.arange(blocks), torch.arange(blocks) + blocks], 1)


@pytest.fixture
def calibrate():
    """make(kind, heads, group, tokens, dim, spread, rotary) -> Calibration-like namespace of skewed Gaussian activations."""

    def make(kind="key", heads=2, group=2, tokens=256, dim=32, spread=1.0, rotary=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        pairs = half_pairs(dim, rotary)
        scale = torch.ones(heads, dim)
        block_scale = torch.exp(spread * torch.randn(heads, len(pairs), generator=generator))
        scale[:, pairs[:, 0]] = block_scale
        scale[:, pairs[:, 1]] = block_scale
        x = torch.randn(heads, tokens, dim, generator=generator) * scale[:, None]
        queries = torch.randn(heads * group, tokens, dim, generator=generator) * scale.repeat_interleave(group, 0)[:, None]
        inv_freq = 10000.0 ** -(torch.arange(len(pairs)) / len(pairs))
        return SimpleNamespace(
            x=x,
            kind=kind,
            layer=0,
            seed=0,
            queries=queries if kind == "key" else None,
            grads=None,
            positions=torch.arange(tokens),
            sample_length=tokens,
            pairs=pairs if kind == "key" else None,
            inv_freq=inv_freq if kind == "key" else None,
        )

    return make
