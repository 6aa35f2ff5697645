"""Decode attention over packed pages against its definition in torch: random shapes, lengths and padding, every output poisoned first."""

import itertools
import random

import pytest
import torch

from kernels import backend, paged, synthetic
from kernels.attention import attend
from kernels.pages import PAGE, Layout, Pages, Pool, room

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMIT = {torch.float16: 1e-2, torch.float32: 2e-3}
pytestmark = pytest.mark.skipif(not backend._installed(), reason="Triton is not installed here")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Whatever a kernel does not write is NaN."""
    real = torch.empty

    def poisoned(*shape, **options):
        made = real(*shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def relative(ours, theirs):
    error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    assert error == error, "an output was not written"
    return error


def pooled(held, generator):
    """The same tokens in stores of shuffled pages, some of them nobody's, behind one table."""
    batch, _, count = held[0].words.shape[:3]
    table = torch.randperm(batch * count + 3, generator=generator)[: batch * count].view(batch, count).to(DEVICE)
    pools = []
    for pages in held:
        words = torch.full((batch * count + 3, *pages.words.shape[1::2]), -1, dtype=torch.int32, device=DEVICE)
        sides = torch.full((batch * count + 3, *pages.sides.shape[2:]), float("nan") if pages.sides.is_floating_point() else 255, device=DEVICE).to(pages.sides.dtype)
        words[table], sides[table] = pages.words.transpose(1, 2), pages.sides
        pools.append(Pool(pages.spec, pages.layout, room_like(words), sides, table.int(), pages.tokens))
    return pools


def room_like(words):
    return room(*words.shape, device=words.device).copy_(words)


def check(dim, group, batch, tokens, key, value, dtype, seed, heads=2, window=None, pool=False, **options):
    generator = torch.Generator().manual_seed(seed)
    widths = key if isinstance(key, int) else synthetic.draw_widths(heads, dim // 2, key, 1.0, generator)
    k = synthetic.spec(heads, dim, widths, centred=True, device=DEVICE, **options)
    v = synthetic.spec(heads, dim, value, centred=True, device=DEVICE, **options)
    pair, held = paged.PagedAttention(k, v), [synthetic.pages(s, batch, tokens, generator) for s in (k, v)]
    query = torch.randn(batch, heads * group, dim, generator=generator).to(DEVICE, dtype)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator).to(DEVICE, torch.int32)
    lengths[-1] = tokens
    first = (torch.rand(batch, generator=generator).to(DEVICE) * lengths).int()
    first[0] = 0
    scale = 1.3 * dim**-0.5
    for pages in held:  # a gain may be 0, and what lies behind the last token must not matter
        pages.sides[(torch.rand(pages.sides.shape, generator=generator) < 0.05).to(DEVICE)] = 0
        if pages.sides.is_floating_point():
            pages.sides.transpose(2, 3).flatten(1, 2)[:, tokens:] = float("nan")
    if pool:
        held = pooled(held, generator)
    output, lse = pair.launch(query, *held, lengths, first, tokens, scale, window=window, splits=int(torch.randint(1, 5, (), generator=generator)))
    dense = [paged.reconstruct(p.spec, *p.symbols()) for p in held]
    for b in range(batch):
        n = int(lengths[b])
        ours = (output[b], lse[b])
        theirs = attend(query[b : b + 1], *(x[b : b + 1, :, :n] for x in dense), scale, first[b : b + 1].long(), window)
        assert relative(ours[0], theirs[0][0]) <= LIMIT[dtype], (dim, group, batch, tokens, key, value, window, pool)
        # Levels are float16: a single logit, all there is in a window of 1, moves with the length of what it multiplies.
        length = scale * float(query[b].float().norm(dim=-1).max() * dense[0][b, :, :n].norm(dim=-1).max())
        torch.testing.assert_close(ours[1], theirs[1][0], atol=length * (1e-3 if dtype == torch.float16 else 1e-4), rtol=1e-3)


CASES = list(itertools.product([64, 96, 128], [1, 2, 4, 8, 16], [1, 2, 3, 4, 2.0, 3.0, 4.5]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", range(3 if DEVICE == "cpu" else 60))
def test_the_kernel_obeys_the_reference(case, dtype):
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    pick = random.Random(seed)
    dim, group, key = pick.choice(CASES)
    longest = 150 if DEVICE == "cpu" else 5000
    options = {"log8": pick.random() < 0.3, "rotated": pick.random() < 0.8}
    options |= {"window": pick.choice([None, None, 1, 40, 150]), "pool": pick.random() < 0.4}
    options["offset"] = isinstance(key, int) and not options["log8"] and pick.random() < 0.5
    check(dim, group, pick.choice([1, 2, 3]), pick.randrange(1, longest), key, pick.choice([1, 2, 3, 4]), dtype, seed, **options)


@pytest.mark.parametrize("key,value", [(3, 3), (2, 2), (3.0, 3), (4, 4), (5.5, 1), (5, 6), (8, 8), (7, 5), (6, 7)])
def test_every_width_once(key, value):
    check(64, 4, 2, 150, key, value, torch.float32, seed=1)


def test_pages_invert_and_append_in_any_chunks():
    generator = torch.Generator().manual_seed(0)
    spec = synthetic.spec(2, 32, [[1, 2, 3, 8, 7, 6, 5, 4, 2, 2, 1, 1, 3, 3, 8, 8], [4] * 16])
    layout = Layout(spec)
    limit = torch.zeros(2, 32, dtype=torch.long)
    for seg in spec.segments:
        limit[seg.head, seg.start : seg.start + seg.size] = 2**seg.width
    codes = (torch.rand(3, 2, 77, 32, generator=generator) * limit[None, :, None]).int()
    words = layout.pack(codes)
    assert words.shape == (3, 2, 3, 128) and torch.equal(layout.unpack(words, 77), codes)
    sides = torch.rand(3, len(spec.segments), 77, generator=generator).half()
    spec = synthetic.spec(2, 32, [[1, 2, 3, 8, 7, 6, 5, 4, 2, 2, 1, 1, 3, 3, 8, 8], [4] * 16])
    object.__setattr__(spec, "symbols", lambda c: (c["codes"], c["sides"]))
    object.__setattr__(spec, "restore", lambda codes, sides: {"codes": codes, "sides": sides})
    held, start = Pages(spec, layout), 0
    for size in (1, 1, 40, 0, 22, 13):
        held.append({"codes": codes[:, :, start : start + size], "sides": sides[:, :, start : start + size]})
        start += size
    assert torch.equal(held.codes["codes"], codes) and torch.equal(held.codes["sides"], sides) and torch.equal(held.words[:, :, :3], words)
    assert held.bytes() == 3 * 3 * (2 * 128 * 4 + len(spec.segments) * PAGE * 2)
    twin = held.select(torch.tensor([2, 0, 0]))
    assert torch.equal(twin.codes["codes"], codes[[2, 0, 0]])


@pytest.mark.parametrize("bits,limit", [(3, 116), (2, 84)])
def test_bytes_per_token_and_head(bits, limit):
    generator = torch.Generator().manual_seed(0)
    key = synthetic.spec(8, 128, synthetic.draw_widths(8, 64, bits, 0.75, generator))
    value = synthetic.spec(8, 128, bits)
    mixed = sum(synthetic.pages(s, 1, PAGE).bytes() for s in (key, value)) / PAGE / 8
    uniform = 2 * synthetic.pages(value, 1, PAGE).bytes() / PAGE / 8
    assert mixed <= limit and uniform == {3: 100, 2: 68}[bits]
