"""The allocator spends the budget exactly, is optimal, and reproduces hand-computed allocations and a published head."""

import itertools

import pytest
import torch

from blockgtq.allocate import allocate, allocate_tiles, block_budget, objective

WORKED_HEAD = (  # Qwen3-8B, layer 10, KV head 4, mean 3 bits (Figure 1c)
    "2 4 2 4 2 2 1 3 3 2 3 2 2 3 3 2 3 3 2 2 2 3 5 3 3 3 2 5 3 2 3 3 "
    "5 2 2 3 3 3 3 3 2 2 5 2 2 2 2 2 3 3 6 3 2 2 3 4 3 3 4 4 4 4 6 8"
)


def counts(widths):
    return torch.bincount(widths.flatten(), minlength=9)[1:].tolist()


def one(scores, budget, **limits):
    return allocate(torch.tensor([scores], dtype=torch.float64), budget, **limits)[0].tolist()


def test_small_vectors():
    assert one([16, 1, 4, 64], 12) == [4, 2, 2, 4]  # a tie: block 0 takes the bit
    assert one([16, 1, 4, 64], 8) == [3, 1, 1, 3]
    assert one([1e6, 1, 1, 1], 12) == [8, 2, 1, 1]


@pytest.mark.parametrize(
    ("base", "budget", "expected", "value"),
    [
        (1.1, 192, [10, 15, 14, 15, 10, 0, 0, 0], 21.6524),
        (1.1, 256, [0, 10, 15, 14, 15, 10, 0, 0], 5.41311),
        (1.3, 128, [41, 5, 5, 5, 6, 2, 0, 0], 149_620),
        (1.3, 192, [30, 5, 5, 6, 5, 5, 6, 2], 12_084.7),
    ],
)
def test_geometric_scores(base, budget, expected, value):
    scores = base ** torch.arange(64, dtype=torch.float64)[None]
    widths = allocate(scores, budget)
    assert counts(widths) == expected and (widths.diff() >= 0).all()
    assert objective(scores, widths).item() == pytest.approx(value, rel=1e-5)


def test_worked_head_comes_back_from_scores_of_its_widths():
    widths = torch.tensor([[int(w) for w in WORKED_HEAD.split()]])
    assert int(widths.sum()) == 192 and counts(widths) == [1, 24, 25, 7, 4, 2, 0, 1]
    assert torch.equal(allocate(4.0 ** widths.double(), 192), widths)


def test_worked_head_from_energies_over_the_median():
    """Energies read off the figure: the widths of the outstanding blocks, the cap at 8 included."""
    widths = [int(w) for w in WORKED_HEAD.split()]
    energies = {63: 2580, 62: 71, 50: 68, 42: 40, 22: 38, 27: 36, 32: 21, 1: 13, 61: 13, 3: 11}
    scores = torch.tensor([[energies.get(i, 4.0 ** (w - 3) * 1.5) for i, w in enumerate(widths)]])
    assert allocate(scores, 192)[0, list(energies)].tolist() == [widths[i] for i in energies]


def loop(scores, budget, b_min, b_max):
    """The paper's greedy rule, one bit at a time."""
    widths = [b_min] * len(scores)
    for _ in range(budget - b_min * len(scores)):
        gains = [s * 4.0**-b if b < b_max else -1.0 for s, b in zip(scores, widths, strict=True)]
        widths[gains.index(max(gains))] += 1
    return widths


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("b_min", "b_max"), [(1, 8), (1, 4), (0, 3), (2, 5)])
def test_equals_the_greedy_loop_and_brute_force(seed, b_min, b_max):
    scores = torch.exp(3 * torch.randn(1, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    if seed == 0:
        scores = torch.tensor([[4.0, 16.0, 4.0, 0.0]], dtype=torch.float64)
    for budget in range(4 * b_min, 4 * b_max + 1):
        widths = allocate(scores, budget, b_min, b_max)
        assert widths[0].tolist() == loop(scores[0].tolist(), budget, b_min, b_max)
        options = [c for c in itertools.product(range(b_min, b_max + 1), repeat=4) if sum(c) == budget]
        best = objective(scores, torch.tensor(options)).min()
        assert objective(scores, widths).item() == pytest.approx(best.item(), rel=1e-12)


def test_one_more_bit_on_average_shifts_every_width():
    scores = torch.exp(torch.randn(8, 32, generator=torch.Generator().manual_seed(1)))
    widths = allocate(scores, 3 * 32)
    assert widths.min() > 1 or torch.equal(allocate(scores, 4 * 32, b_min=2, b_max=9), widths + 1)
    free = allocate(scores, 5 * 32, b_min=0, b_max=30)
    assert torch.equal(allocate(scores, 6 * 32, b_min=0, b_max=30), free + 1)


def test_closed_form_without_limits():
    scores = torch.exp(2 * torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).double())
    widths = allocate(scores, 10 * 64, b_min=0, b_max=30)
    ideal = 10 + (scores.log2() - scores.log2().mean(1, keepdim=True)) / 2
    assert (widths - ideal).abs().max() < 1


def test_heads_are_independent_and_spend_the_budget():
    scores = torch.rand(6, 16, generator=torch.Generator().manual_seed(3)) ** 6
    widths = allocate(scores, 37)
    assert (widths.sum(1) == 37).all() and widths.min() >= 1 and widths.max() <= 8
    assert torch.equal(widths, torch.cat([allocate(scores[h : h + 1], 37) for h in range(6)]))
    assert torch.equal(allocate(scores * 1e-7, 37), widths)


def test_zero_scores_still_spend_the_budget():
    assert one([0.0, 0.0], 10) == [8, 2]


def test_budget():
    assert block_budget(64, 3) == 192 and block_budget(64, 2.5) == 160 and block_budget(100, 2.3) == 230
    assert block_budget(3, 2.5) == 7


@pytest.mark.parametrize("budget", [3, 33])
def test_impossible_budget(budget):
    with pytest.raises(ValueError, match="do not fit"):
        allocate(torch.ones(1, 4), budget)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_bad_scores(bad):
    with pytest.raises(ValueError, match="finite and not negative"):
        allocate(torch.tensor([[1.0, bad]]), 4)


def test_bad_limits():
    with pytest.raises(ValueError, match="b_min"):
        allocate(torch.ones(1, 4), 8, b_min=3, b_max=2)


def test_tiles_of_one_block_are_the_paper():
    scores = torch.rand(3, 24, generator=torch.Generator().manual_seed(4)).round(decimals=1)  # with ties
    assert torch.equal(allocate_tiles(scores, 2.5), allocate(scores, 60))


@pytest.mark.parametrize("seed", range(4))
def test_tiles_are_the_best_that_share_widths(seed):
    """Against all ways of splitting six blocks into pairs and all widths of the pairs."""
    scores = 2 ** (3 * torch.randn(1, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    widths = allocate_tiles(scores, 7 / 3, 2, b_max=4)
    assert counts(widths) == [2 * n for n in counts(widths[:, widths[0].argsort()][:, ::2])] and int(widths.sum()) == 14
    best = min(
        objective(scores[0, list(order)], torch.tensor(pairs).repeat_interleave(2)).item()
        for order in itertools.permutations(range(6))
        for pairs in itertools.product(range(1, 5), repeat=3)
        if sum(pairs) == 7
    )
    assert objective(scores, widths).item() == pytest.approx(best)


def test_tiles_must_divide_the_blocks():
    with pytest.raises(ValueError, match="tile=4 does not divide 6 blocks"):
        allocate_tiles(torch.ones(1, 6), 2, 4)
