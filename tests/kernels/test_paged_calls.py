"""Calls of decode attention one behind the other, on a GPU replays of one graph: each sees the query and the lengths it was given."""

import pytest
import torch

from kernels import backend, paged, synthetic, timing
from kernels.attention import attend

pytestmark = pytest.mark.skipif(not backend._installed(), reason="Triton is not installed here")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.mark.parametrize("early", [False, True] if CUDA else [False])
def test_each_call_sees_its_own(early, monkeypatch):
    from kernels import merge_triton

    monkeypatch.setattr(backend, "EARLY", 256 if early else 0)
    monkeypatch.setattr(merge_triton, "DIRECT", 2)  # splits are folded, too
    monkeypatch.setattr(merge_triton, "FOLDED", 2)
    tokens, heads, group, dim = (9000, 8, 4, 128) if CUDA else (400, 1, 2, 32)
    generator = torch.Generator().manual_seed(0)
    specs = [synthetic.spec(heads, dim, 2, offset=True, integers=True, device=DEVICE) for _ in range(2)]
    pair, held = paged.PagedAttention(*specs), [synthetic.pages(s, 1, tokens, generator) for s in specs]
    query, lengths = torch.zeros(1, heads * group, dim, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    first, scale, count = torch.zeros_like(lengths), dim**-0.5, 3

    def calls():
        return [pair.launch(query * (i + 1), *held, lengths - i, first, tokens, scale, splits=4) for i in range(count)]

    if CUDA:
        lengths.fill_(tokens)
        graph, found = timing.capture(calls)
    dense = [paged.reconstruct(p.spec, *p.symbols()) for p in held]
    for length in (tokens, tokens // 3, tokens - 7)[: 3 if CUDA else 2]:
        query.copy_(torch.randn(query.shape, generator=generator))
        lengths.fill_(length)
        if CUDA:
            graph.replay()
        else:
            found = calls()
        for i, (output, lse) in enumerate(found):
            theirs = attend(query * (i + 1), *(x[:, :, : length - i] for x in dense), scale)
            torch.testing.assert_close(output, theirs[0], atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(lse, theirs[1], atol=2e-3, rtol=2e-3)
