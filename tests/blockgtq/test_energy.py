"""Block energies: any pairing, invariant under RoPE, query heads averaged separately."""

import pytest
import torch

from blockgtq.energy import SCORES, block_energy, score_blocks


@pytest.fixture
def activations():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 50, 8, generator=generator), torch.randn(6, 50, 8, generator=generator)


HALF = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])
INTERLEAVED = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])


def test_energy_by_hand(activations):
    x, _ = activations
    expected = (x[1, :, 2].double() ** 2 + x[1, :, 6].double() ** 2).mean()
    assert block_energy(x, HALF)[1, 2].item() == pytest.approx(expected.item())


def test_pairings_agree_on_reordered_channels(activations):
    keys, queries = activations
    to_interleaved = HALF.flatten()  # channel of the half layout at every place of the interleaved one
    for score in SCORES:
        half = score_blocks(keys, queries, HALF, score)
        interleaved = score_blocks(keys[..., to_interleaved], queries[..., to_interleaved], INTERLEAVED, score)
        torch.testing.assert_close(half, interleaved)


def test_invariant_under_rope(activations):
    x, _ = activations
    angle = torch.arange(50)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    a, b = x[..., :4], x[..., 4:]
    rotated = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
    torch.testing.assert_close(block_energy(rotated, HALF), block_energy(x, HALF), rtol=1e-5, atol=1e-6)


def test_query_heads_are_averaged_separately(activations):
    keys, queries = activations
    score = score_blocks(keys, queries, HALF, "q_only")
    torch.testing.assert_close(score[1], block_energy(queries[3:], HALF).mean(0))
    of_mean = block_energy(queries.unflatten(0, (2, 3)).mean(1), HALF)
    assert (score > of_mean).all()


def test_score_variants(activations):
    keys, queries = activations
    k, q = score_blocks(keys, queries, HALF, "k_only"), score_blocks(keys, queries, HALF, "q_only")
    expected = {"qk_avg": (q + k) / 2, "qk_max": torch.maximum(q, k), "qk_product": (q * k).sqrt(), "qk_mse": q * k}
    for score, value in expected.items():
        torch.testing.assert_close(score_blocks(keys, queries, HALF, score), value)
    torch.testing.assert_close(score_blocks(keys, queries, HALF), expected["qk_avg"])


def test_qk_mse_ignores_the_scale_shared_by_queries_and_keys(activations):
    keys, queries = activations
    torch.testing.assert_close(
        score_blocks(keys / 8, queries * 8, HALF, "qk_mse"), score_blocks(keys, queries, HALF, "qk_mse"), rtol=1e-6, atol=0
    )


def test_errors(activations):
    keys, queries = activations
    with pytest.raises(ValueError, match="qk_avg, qk_max"):
        score_blocks(keys, queries, HALF, "best")
    with pytest.raises(ValueError, match="needs calibration queries"):
        score_blocks(keys, None, HALF)
    assert score_blocks(keys, None, HALF, "k_only").shape == (2, 4)
    with pytest.raises(ValueError, match="5 query heads"):
        score_blocks(keys, queries[:5], HALF)
