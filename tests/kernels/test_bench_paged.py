"""What a timing is checked against: the definition in spans, and an error that no missing output passes."""

import math

import pytest
import torch

pytest.importorskip("triton")

from kernels import bench_paged, paged, synthetic  # noqa: E402
from kernels.attention import attend  # noqa: E402


def test_the_definition_in_spans_is_the_definition():
    generator = torch.Generator().manual_seed(0)
    specs = [synthetic.spec(2, 64, 3), synthetic.spec(2, 64, 2, offset=True)]
    held = [synthetic.pages(s, 1, 150, generator) for s in specs]
    query = torch.randn(1, 4, 64, generator=generator)
    spans = bench_paged.definition(paged.PagedAttention(*specs), query, *held, 150, span=64)
    whole = attend(query, *(paged.reconstruct(p.spec, *p.symbols()) for p in held), bench_paged.DIM**-0.5)
    assert bench_paged.error(spans, whole) < 1e-5
    for spoiled in ((whole[0] * 1.02, whole[1]), (whole[0], whole[1] + 0.1), (torch.where(whole[0] == whole[0][0, 0, 0], torch.nan, whole[0]), whole[1])):
        assert bench_paged.error(spoiled, whole) > bench_paged.LIMIT
    assert math.isinf(bench_paged.error((whole[0] * torch.nan, whole[1]), whole))


def test_tuning_reaches_the_launches(monkeypatch):
    for name in ("STAGES", "AHEAD", "VALUE_AHEAD", "VTILE", "KEY_UNROLL", "UNROLL", "WARPS", "LIMIT"):
        monkeypatch.setattr(bench_paged.backend, name, getattr(bench_paged.backend, name))
    bench_paged.apply({"STAGES": 1, "AHEAD": 3, "VALUE_AHEAD": 2, "VTILE": 32, "KEY_UNROLL": 1, "UNROLL": 1, "WARPS": 12, "registers": 0})
    assert (bench_paged.backend.AHEAD, bench_paged.backend.VTILE, bench_paged.backend.WARPS, bench_paged.backend.LIMIT) == (3, 32, 12, {})
