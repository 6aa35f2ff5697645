"""Sampling per row: the right distribution, the right set, and nothing that depends on batches or global generators."""

import pytest
import torch

from kvq.sampling import Sampler, seed_of

LOGITS = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).log()


def draws(count, temperature=1.0, top_p=1.0, logits=LOGITS):
    chosen = Sampler(temperature, top_p, list(range(count)))(None, logits.expand(count, -1))
    assert ((chosen == 0).sum(-1) == 1).all() and (torch.isinf(chosen).sum(-1) == len(logits) - 1).all()
    return chosen.argmax(-1)


@pytest.mark.parametrize(
    "temperature, top_p, expected",
    [
        (1.0, 1.0, LOGITS.exp()),
        (0.5, 1.0, torch.softmax(LOGITS * 2, -1)),
        (1.0, 0.6, torch.tensor([4 / 7, 3 / 7, 0, 0, 0])),  # 0.4 is not enough, 0.4 + 0.3 is
        (1.0, 0.95, torch.tensor([0.4, 0.3, 0.2, 0.06, 0]) / 0.96),
        (1.0, 0.01, torch.tensor([1.0, 0, 0, 0, 0])),
    ],
)
def test_frequencies_follow_the_truncated_softmax(temperature, top_p, expected):
    counts = torch.bincount(draws(20_000, temperature, top_p), minlength=5) / 20_000
    assert (counts - expected).abs().max() < 0.012 and (counts[expected == 0] == 0).all()


def test_order_of_the_vocabulary_does_not_matter():
    turned = torch.tensor([4, 2, 0, 1, 3])
    assert torch.equal(turned[draws(500, top_p=0.9, logits=LOGITS[turned])], draws(500, top_p=0.9))


def test_a_row_is_the_same_in_any_batch_and_leaves_the_global_generator_alone():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    before = torch.random.get_rng_state()
    together, third = Sampler(0.6, 0.95, [5, 6, 7, 8]), Sampler(0.6, 0.95, [7])
    for _ in range(20):
        assert torch.equal(together(None, logits)[2], third(None, logits[2:3])[0])
    assert torch.equal(before, torch.random.get_rng_state())


def test_seeds_differ_by_every_part():
    assert len({seed_of(0, "a/1"), seed_of(1, "a/1"), seed_of(0, "a/2"), seed_of(0, "a", 1, 2)}) == 4
    assert seed_of(0, "a") == seed_of(0, "a") < 2**63
