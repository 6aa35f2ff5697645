"""Attention of a chunk against its definition: random shapes, offsets, padding and windows, outputs poisoned first."""

import random

import pytest
import torch

from kernels import backend, paged, prefill, synthetic
from tests.kernels.test_paged import DEVICE, LIMIT, poison, pooled, relative  # noqa: F401

pytestmark = pytest.mark.skipif(not backend._installed(), reason="Triton is not installed here")


def plain(query, key, value, scale, at, first, window):
    """One query at a time, in float64."""
    batch, heads, chunk, dim = query.shape
    output, lse = torch.zeros(batch, heads, chunk, dim, dtype=torch.float64), torch.full((batch, heads, chunk), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            k, v = (x[b, h // (heads // key.shape[1])].double().cpu() for x in (key, value))
            for i in range(chunk):
                low, high = max(0, int(first[b]), at + i + 1 - (window or 10**9)), min(at + i + 1, len(k))
                if low < high:
                    score = k[low:high] @ query[b, h, i].double().cpu() * scale
                    lse[b, h, i] = score.logsumexp(0)
                    output[b, h, i] = score.softmax(0) @ v[low:high]
    return output, lse


def compare(ours, theirs, dtype):
    assert relative(ours[0].cpu(), theirs[0]) <= LIMIT[dtype]
    torch.testing.assert_close(ours[1].double().cpu(), theirs[1], atol=2e-2 if dtype == torch.float16 else 2e-3, rtol=1e-3)


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("case", range(4 if DEVICE == "cpu" else 40))
def test_a_chunk_sees_what_is_before_it(case, triton, monkeypatch):
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    monkeypatch.setattr(backend, "use_triton", lambda x: triton)
    dim, group, heads, batch, dtype = pick.choice([64, 96, 128]), pick.choice([1, 2, 4]), pick.choice([1, 2]), pick.choice([1, 2]), pick.choice(list(LIMIT))
    chunk, tokens = pick.randrange(1, 90), pick.randrange(1, 260)
    at, window = pick.choice([tokens - chunk, tokens, tokens + 7, -3, 0]), pick.choice([None, 1, 40, 200])
    draw = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE, dtype)  # noqa: E731
    query, key, value = draw(batch, heads * group, chunk, dim), draw(batch, heads, tokens, dim), draw(batch, heads, tokens, dim)
    first = torch.tensor([0, pick.randrange(0, tokens + 5)][:batch], device=DEVICE)
    expected = plain(query, key, value, 0.2, at, first, window)
    if not (expected[1] > -torch.inf).any():
        first, at, expected = first * 0, tokens, plain(query, key, value, 0.2, tokens, first * 0, None)
        window = None
    compare(prefill.attend_chunk(query, key, value, 0.2, at, first, window), expected, dtype)


@pytest.mark.parametrize("key,value,options,dtype", [
    (3.0, 3, {}, torch.float16), (3, 2, {"log8": True}, torch.float32), (4, 4, {"offset": True, "rotated": False}, torch.float16), (6.5, 8, {}, torch.float32),
], ids=str)  # fmt: skip
def test_a_chunk_reads_pages(key, value, options, dtype, monkeypatch):
    monkeypatch.setattr(prefill, "SCRATCH", 64 * 2 * 2 * 2 * 64 * 4)  # spans of 64 or 128 tokens
    generator = torch.Generator().manual_seed(5)
    widths = key if isinstance(key, int) else synthetic.draw_widths(2, 32, key, 1.0, generator)
    specs = [synthetic.spec(2, 64, w, centred=True, device=DEVICE, **options) for w in (widths, value)]
    pair, held = paged.PagedAttention(*specs), [synthetic.pages(s, 2, 213, generator) for s in specs]
    for pages in held:  # what lies behind the last token must not matter
        if pages.sides.is_floating_point():
            pages.sides.transpose(2, 3).flatten(1, 2)[:, 213:] = float("nan")
    query, first = torch.randn(2, 6, 30, 64, generator=generator).to(DEVICE, dtype), torch.tensor([0, 195], device=DEVICE)
    for tokens, at, window in ((213, 183, None), (150, 183, 50)):
        dense = [paged.reconstruct(s, *p.symbols())[:, :, :tokens] for s, p in zip(specs, held)]
        ours = prefill.attend_pages(query, *(pooled(held, generator) if window else held), tokens, at, scale=0.15, first=first, window=window)
        compare(ours, plain(query, *dense, 0.15, at, first, window), dtype)
    assert pair.attend_chunk(query, *held, 213, 183, scale=0.15)[0].shape == query.shape
