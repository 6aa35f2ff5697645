"""The block decomposition of the RoPE logit equals explicit rotation, and the attention metrics equal their definitions."""

import math

import pytest
import torch

from blockgtq.diagnose import attention_kl_topk, logit_mae, rotate

HALF = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])
INTERLEAVED = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
PARTIAL = torch.tensor([[0, 2], [1, 3]])


def activations(tokens=5):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, tokens, 8, generator=generator)
    k = torch.randn(2, tokens, 8, generator=generator)
    return q, k, k + 0.1 * torch.randn(2, tokens, 8, generator=generator)


def matrix(pairs, inv_freq, offset):
    """R_delta as a dense matrix [8, 8], written from the definition."""
    r = torch.eye(8, dtype=torch.float64)
    for (i, j), theta in zip(pairs.tolist(), inv_freq.tolist(), strict=True):
        c, s = math.cos(offset * theta), math.sin(offset * theta)
        r[i, i], r[i, j], r[j, i], r[j, j] = c, -s, s, c
    return r


@pytest.mark.parametrize("pairs", [HALF, INTERLEAVED, PARTIAL])
def test_logit_error_equals_explicit_rotation(pairs):
    q, k, k_hat = activations()
    inv_freq = 100.0 ** -(torch.arange(len(pairs)) / len(pairs))
    offsets = torch.linspace(-20, 20, 7)
    expected = torch.zeros(2, dtype=torch.float64)
    for head in range(4):
        for offset in offsets.tolist():
            r = matrix(pairs, inv_freq, offset)
            error = [q[head, t].double() @ r @ (k[head // 2, t] - k_hat[head // 2, t]).double() for t in range(5)]
            expected[head // 2] += torch.stack(error).abs().sum() / (2 * 7 * 5)
    torch.testing.assert_close(logit_mae(q, k, k_hat, pairs, inv_freq, offsets), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("pairs", [HALF, INTERLEAVED, PARTIAL])
def test_rotation_depends_on_the_difference_of_positions(pairs):
    q, k, _ = activations()
    inv_freq = 100.0 ** -(torch.arange(len(pairs)) / len(pairs)).double()
    q, k = q[:2].double(), k.double()
    logit = (rotate(q, torch.full((5,), 7), pairs, inv_freq) * rotate(k, torch.full((5,), 3), pairs, inv_freq)).sum(-1)
    shifted = (q * (k @ matrix(pairs, inv_freq, 3 - 7).T)).sum(-1)
    torch.testing.assert_close(logit, shifted)
    torch.testing.assert_close(rotate(k, torch.arange(5), pairs, inv_freq).norm(dim=-1), k.norm(dim=-1))


def test_rotation_equals_the_split_half_formula():
    _, k, _ = activations()
    inv_freq = torch.tensor([1.0, 0.3, 0.1, 0.03])
    angle = (torch.arange(5)[:, None] * inv_freq).repeat(1, 2)
    rotate_half = torch.cat([-k[..., 4:], k[..., :4]], -1)
    torch.testing.assert_close(rotate(k, torch.arange(5), HALF, inv_freq), k * angle.cos() + rotate_half * angle.sin())


def test_kl_and_overlap_by_definition():
    q, k, k_hat = activations(12)
    inv_freq = torch.tensor([1.0, 0.3, 0.1, 0.03])
    kl, overlap = attention_kl_topk(q, k, k_hat, HALF, inv_freq, queries=4, top=3)
    expected_kl, expected_overlap = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for head in range(4):
        for t in range(8, 12):
            s = [
                torch.stack([q[head, t].double() @ matrix(HALF, inv_freq, i - t) @ x[head // 2, i].double() for i in range(t)])
                for x in (k, k_hat)
            ]
            p, p_hat = ((v / math.sqrt(8)).softmax(0) for v in s)
            expected_kl[head // 2] += (p * (p / p_hat).log()).sum() / 8
            top, top_hat = (set(v.topk(3).indices.tolist()) for v in s)
            expected_overlap[head // 2] += len(top & top_hat) / 3 / 8
    torch.testing.assert_close(kl, expected_kl, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(overlap, expected_overlap)


def test_exact_keys_have_no_error():
    q, k, _ = activations(20)
    inv_freq = torch.ones(4)
    assert logit_mae(q, k, k, HALF, inv_freq, torch.arange(3)).max() == 0
    kl, overlap = attention_kl_topk(q, k, k, HALF, inv_freq, queries=10, top=10)
    assert kl.abs().max() == 0 and (overlap == 1).all()


def test_too_few_keys():
    q, k, _ = activations(12)
    with pytest.raises(ValueError, match="sees 2 keys"):
        attention_kl_topk(q, k, k, HALF, torch.ones(4), queries=10, top=3)
