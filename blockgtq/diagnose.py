"""What key quantization does to attention, and how allocations differ: logit error, softmax KL, top-k overlap, width distances (arXiv 2606.24033).

All functions take queries and keys before RoPE and apply the rotation themselves, for any pairing of channels:
q^T R_delta k = sum_i cos(delta theta_i) <q_i, k_i> + sin(delta theta_i) (q_i2 k_i1 - q_i1 k_i2) + <q, k> over unrotated channels.
"""

import torch
from torch import Tensor

from .allocate import objective
from .layout import unrotated


def rotate(x: Tensor, positions: Tensor, pairs: Tensor, inv_freq: Tensor) -> Tensor:
    """RoPE of x [..., N, D] at positions [N]: channels pairs [L, 2] turn by positions * inv_freq [L] radians, others stay."""
    angle = positions.to(inv_freq.dtype)[:, None] * inv_freq
    first, second = x[..., pairs[:, 0]], x[..., pairs[:, 1]]
    turned = x.clone()
    turned[..., pairs[:, 0]] = first * angle.cos() - second * angle.sin()
    turned[..., pairs[:, 1]] = first * angle.sin() + second * angle.cos()
    return turned


def logit_mae(q: Tensor, k: Tensor, k_hat: Tensor, pairs: Tensor, inv_freq: Tensor, offsets: Tensor) -> Tensor:
    """Mean |q^T R_delta (k - k_hat)| per KV head [H] float64, over the queries of the group, tokens and offsets.

    q [Hq, N, D] and k, k_hat [H, N, D] before RoPE, query and key taken at the same token as in the public code; offsets [O]
    are key minus query positions, the paper's being torch.linspace(-1024, 1024, 50). No 1/sqrt(D) and no softmax.
    """
    error = (k.double() - k_hat.double()).repeat_interleave(q.shape[0] // k.shape[0], 0)
    q = q.double()
    static = unrotated(pairs.cpu(), q.shape[-1]).to(q.device)
    angle = offsets.to(q)[:, None] * inv_freq.to(q)  # [O, L]
    total = []
    for q_head, e_head in zip(q, error, strict=True):
        q1, q2, e1, e2 = q_head[:, pairs[:, 0]], q_head[:, pairs[:, 1]], e_head[:, pairs[:, 0]], e_head[:, pairs[:, 1]]
        logit = (q1 * e1 + q2 * e2) @ angle.cos().T + (q2 * e1 - q1 * e2) @ angle.sin().T  # [N, O]
        logit += (q_head[:, static] * e_head[:, static]).sum(-1, keepdim=True)
        total.append(logit.abs().mean())
    return torch.stack(total).unflatten(0, (k.shape[0], -1)).mean(1)


def attention_kl_topk(
    q: Tensor, k: Tensor, k_hat: Tensor, pairs: Tensor, inv_freq: Tensor, queries: int = 1024, top: int = 10
) -> tuple[Tensor, Tensor]:
    """KL(p || p_hat) in nats and top-k overlap in [0, 1] per KV head, each [H], averaged over the last `queries` query tokens.

    q [Hq, N, D] and k, k_hat [H, N, D] before RoPE, tokens at positions 0 .. N - 1. A query sees all earlier keys, not its own;
    p = softmax(s / sqrt(D)) of the exact logits, p_hat of the quantized keys' logits, at the true relative positions.
    Raises ValueError unless every query sees at least `top` keys.
    """
    group, tokens = q.shape[0] // k.shape[0], q.shape[1]
    first = tokens - queries
    if first < top:
        raise ValueError(
            f"With {tokens} tokens and {queries} queries the first query sees {max(first, 0)} keys; top={top} needs more."
        )
    positions = torch.arange(tokens, device=q.device)
    inv_freq = inv_freq.to(q.device, torch.float64)
    future = positions[None, :] >= positions[first:, None]
    divergence, overlap = [], []
    for head in range(q.shape[0]):
        query = rotate(q[head].double(), positions, pairs, inv_freq)[first:]
        exact, coded = (
            (query @ rotate(keys[head // group].double(), positions, pairs, inv_freq).T).masked_fill(future, -torch.inf)
            for keys in (k, k_hat)
        )
        log_p, log_p_hat = ((s * q.shape[-1] ** -0.5).log_softmax(-1) for s in (exact, coded))
        divergence.append((log_p.exp() * (log_p - log_p_hat).masked_fill(future, 0)).sum(-1).mean())
        chosen, chosen_hat = (torch.zeros_like(s).scatter_(-1, s.topk(top, -1).indices, 1) for s in (exact, coded))
        overlap.append((chosen * chosen_hat).sum(-1).mean() / top)
    return tuple(torch.stack(v).unflatten(0, (k.shape[0], group)).mean(1) for v in (divergence, overlap))


def compare_widths(widths: Tensor, reference: Tensor, scores: Tensor, high: int = 4) -> dict[str, float]:
    """Distance of widths [H, L] to a reference allocation [H, L] with its scores [H, L], over all heads and blocks.

    hamming: share of blocks whose width differs. high_jaccard: Jaccard index of the blocks of at least `high` bits, 1 if neither
    has any. regret: sum s (4^-b - 4^-b_ref) / sum s 4^-b_ref; never negative at equal sums and limits.
    """
    both, either = ((widths >= high) & (reference >= high)).sum(), ((widths >= high) | (reference >= high)).sum()
    best = objective(scores, reference).sum()
    return {
        "hamming": float((widths != reference).double().mean()),
        "high_jaccard": float(both / either) if either else 1.0,
        "regret": float(objective(scores, widths).sum() / best - 1),
    }


def summarize_widths(widths: Tensor, largest: int = 8) -> dict[str, float]:
    """Share of blocks per width, entropy in bits and number of distinct widths, pooled over the heads of a layer; widths [H, L]."""
    share = torch.bincount(widths.flatten(), minlength=largest + 1).double() / widths.numel()
    entropy = -(share * share.clamp_min(1e-300).log2()).sum()
    return {"entropy": float(entropy), "groups": float((share > 0).sum()), **{f"width/{b}": float(share[b]) for b in range(1, largest + 1)}}
