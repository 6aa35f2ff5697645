"""Numbers drawn ahead are those of the generator, whatever was supposed of it."""

import pytest
import torch

from kernels import draws, kmeans


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("between", [[(3, 4)] * 2, [(3, 4)], []], ids=["as supposed", "one draw less", "none"])
@pytest.mark.parametrize("shape", [(5, 700), (5, 3)])
def test_numbers_and_what_follows_them_are_the_generators(between, shape):
    ours, theirs = seeded(), seeded()
    draws.draw_ahead((5, 700), ours, [(3, 4)] * 2)
    for size in between:
        assert torch.equal(torch.rand(size, generator=ours), torch.rand(size, generator=theirs))
    assert torch.equal(draws.drawn(shape, ours), torch.rand(shape, generator=theirs))
    assert torch.equal(torch.rand(9, generator=ours), torch.rand(9, generator=theirs))


def test_numbers_are_drawn_ahead_once(monkeypatch):
    ours, theirs = seeded(), seeded()
    draws.draw_ahead((600,), ours, [])
    draws._ahead[ours].result()
    monkeypatch.setattr(torch, "rand", lambda *a, **k: pytest.fail("drawn when asked for"))
    first = draws.drawn((600,), ours)
    monkeypatch.undo()
    assert torch.equal(first, torch.rand(600, generator=theirs)) and torch.equal(draws.drawn((600,), ours), torch.rand(600, generator=theirs))


def test_what_nobody_asks_for_is_dropped():
    for seed in range(3 * draws.KEPT):
        draws.draw_ahead((4,), seeded(seed), [])
    assert len(draws._ahead) <= draws.KEPT


def test_clusterings_of_one_generator_do_not_change(monkeypatch):
    x = torch.randn(2, 900, 4, generator=seeded(1))
    for rounds in (3, 200):  # 200 rounds are more than it takes, so that what was supposed is wrong
        found = []
        for ahead in (True, False):
            generator = seeded()
            monkeypatch.setattr(kmeans, "AHEAD", ahead)
            found.append([kmeans.cluster(x, 8, update=kmeans.mean, start="equal_norm", rounds=rounds, generator=generator, empty=e) for e in ("reseed", "keep", "reseed")])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a.entries, b.entries) and a.objective == b.objective
