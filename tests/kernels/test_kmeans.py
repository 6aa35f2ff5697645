"""Clustering obeys its mathematics: nearest is nearest, means are means, the objective falls, draws are seeded."""

import math

import pytest
import torch

from kernels.kmeans import STARTS, cluster, kmeans, mean, nearest, start, sums


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(groups=2, n=600, width=12, seed=0):
    draw = seeded(seed)
    centres = 3 * torch.randn(groups, 10, width, generator=draw)
    return centres[:, torch.randint(0, 10, (n,), generator=draw)] + torch.randn(groups, n, width, generator=draw)


def test_nearest_is_the_l2_minimum_and_gives_its_distance():
    x, entries = blobs(), blobs(n=33, seed=1)
    labels, scores = nearest(x, entries)
    distances = torch.cdist(x, entries).square()
    assert torch.equal(labels, distances.argmin(-1))
    torch.testing.assert_close(x.square().sum(-1) - 2 * scores, distances.amin(-1), rtol=1e-4, atol=1e-3)
    cosine = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(entries, dim=-1).mT
    labels, _ = nearest(x, torch.nn.functional.normalize(entries, dim=-1), cosine=True)
    assert torch.equal(labels, cosine.argmax(-1))


def test_chunks_do_not_change_the_answer(monkeypatch):
    x, entries = blobs(), blobs(n=33, seed=1)
    whole = nearest(x, entries)
    monkeypatch.setattr("kernels.kmeans.SCORES", 700)
    labels, scores = nearest(x, entries)
    assert torch.equal(labels, whole[0])
    torch.testing.assert_close(scores, whole[1])


def test_lloyd_step_and_captured_energy():
    x, weights = blobs(), torch.rand(2, 600, generator=seeded(2)) + 0.1
    labels, _ = nearest(x, x[:, :7])
    entries, mass = mean(x, weights, 1 / x.norm(dim=-1), labels, x[:, :7])
    for g in range(2):
        for k in range(7):
            member = labels[g] == k
            expected = (weights[g, member, None] * x[g, member]).sum(0) / weights[g, member].sum()
            torch.testing.assert_close(entries[g, k], expected)
    torch.testing.assert_close(mass, sums(x, weights, labels, 7)[0])
    # With the partition fixed: E||x - mu||^2 = E||x||^2 - E||mu||^2.
    own = entries.gather(1, labels[..., None].expand_as(x))
    lost = (weights * (x - own).square().sum(-1)).sum(1)
    kept = (mass * entries.square().sum(-1)).sum(1)
    torch.testing.assert_close(lost + kept, (weights * x.square().sum(-1)).sum(1), rtol=1e-4, atol=0)


def test_two_weightings_of_one_labelling():
    x, (weights, factor) = blobs(), torch.rand(2, 2, 600, generator=seeded(2))
    labels, _ = nearest(x, x[:, :7])
    labels[labels == 5] = 6  # an entry without members
    mass, total = sums(x, weights, labels, 7, factor)
    member = torch.nn.functional.one_hot(labels, 7).float()
    torch.testing.assert_close(mass, torch.einsum("gn,gnk->gk", weights, member))
    torch.testing.assert_close(total, torch.einsum("sgn,gnk,gnd->sgkd", torch.stack([weights, weights * factor]), member, x), rtol=1e-4, atol=1e-4)
    assert (total[:, :, 5] == 0).all()
    for weighting, both in zip((weights, weights * factor), total, strict=True):
        assert torch.equal(sums(x, weighting, labels, 7)[1], both)


def test_few_vectors_are_assigned_like_many():
    x, entries = blobs(), blobs(n=33, seed=1)
    labels, scores = nearest(x, entries)
    few = nearest(x[:, :5], entries)
    assert torch.equal(few[0], labels[:, :5])
    torch.testing.assert_close(few[1], scores[:, :5])


def test_without_tolerance_a_rise_does_not_stop_the_rounds():
    x = blobs(groups=1)

    def drift(x, weights, inverse, labels, entries):
        return 1.3 * entries, torch.ones_like(entries[..., 0])

    options = {"update": drift, "rounds": 5, "generator": seeded()}
    found = cluster(x, 8, **options)
    assert len(found.objective[0]) > 2 and found.objective[0][-1] > found.objective[0][0]
    assert torch.equal(found.entries, cluster(x, 8, update=mean, rounds=0, generator=seeded()).entries)


@pytest.mark.parametrize("how", STARTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_objective_never_rises(how, weighted):
    x = blobs()
    weights = torch.rand(2, 600, generator=seeded(2)) if weighted else None
    found = kmeans(x, 16, weights, start=how, rounds=20, empty="keep", generator=seeded())
    for path in found.objective:
        assert all(after <= before * (1 + 1e-5) for before, after in zip(path, path[1:], strict=False))
        assert len(path) > 2


def test_returned_entries_are_the_best_iterate():
    x = blobs()
    found = kmeans(x, 16, start="random", rounds=3, generator=seeded())
    error = (x.square().sum(-1) - 2 * nearest(x, found.entries)[1]).sum(1)
    for g in range(2):
        assert math.isclose(error[g].item(), min(found.objective[g]), rel_tol=1e-4)


def test_groups_are_independent_of_their_neighbours():
    x = blobs(groups=3)
    options = {"start": "random", "rounds": 30, "tolerance": 1e-3}
    first = cluster(x, 8, update=mean, generator=seeded(), **options)
    x[1:] = torch.randn(2, 600, 12, generator=seeded(5))
    second = cluster(x, 8, update=mean, generator=seeded(), **options)
    torch.testing.assert_close(first.entries[0], second.entries[0])


def test_seed_decides_and_the_global_generator_is_untouched():
    x, before = blobs(), torch.get_rng_state()
    runs = [kmeans(x, 8, start=how, rounds=4, generator=seeded(s)).entries for how in STARTS for s in (0, 0, 1)]
    for i in range(0, len(runs), 3):
        assert torch.equal(runs[i], runs[i + 1]) and not torch.equal(runs[i], runs[i + 2])
    assert torch.equal(before, torch.get_rng_state())


def test_empty_entries_get_a_new_place_and_are_counted():
    x = torch.cat([torch.ones(1, 500, 4), blobs(groups=1, n=100, width=4)], 1)  # a random start takes the duplicates
    kept = kmeans(x, 16, start="random", empty="keep", generator=seeded())
    moved = kmeans(x, 16, start="random", empty="reseed", generator=seeded())
    assert kept.reseeded == [0] and moved.reseeded[0] > 0
    assert min(moved.objective[0]) < min(kept.objective[0])
    assert nearest(x, moved.entries)[0].unique().numel() > nearest(x, kept.entries)[0].unique().numel()


def test_zeros_duplicates_and_extreme_norms_stay_finite():
    for x in (torch.zeros(1, 40, 4), torch.ones(1, 40, 4), 1e12 * blobs(1, 40, 4), 1e-12 * blobs(1, 40, 4)):
        for how in STARTS:
            assert kmeans(x, 8, start=how, rounds=4, generator=seeded()).entries.isfinite().all()
    x = blobs(1, 40, 4)
    x[:, 10:] = 0
    assert (start(x, torch.ones(1, 40), (x.norm(dim=-1) > 0).float(), 8, "random", 0, seeded()).norm(dim=-1) > 0).all()


def test_refusals():
    with pytest.raises(ValueError, match="at least 16 vectors"):
        kmeans(blobs(n=15), 16, generator=seeded())
    with pytest.raises(ValueError, match="random, kmeans"):
        kmeans(blobs(), 16, start="forgy", generator=seeded())
    with pytest.raises(ValueError, match="reseed or keep"):
        kmeans(blobs(), 16, empty="drop", generator=seeded())
