"""Query and key energy of every RoPE block, and the scores made from them (Block-GTQ, arXiv 2606.24033, sections on score and GQA).

A RoPE block is the pair of channels (i, j) that one frequency rotates together; its energy E|x_i|^2 = E[x[i]^2 + x[j]^2] does
not change under the rotation, so it may be taken before or after RoPE.
"""

from types import MappingProxyType

import torch
from torch import Tensor

SCORES = MappingProxyType(
    {
        "qk_avg": lambda q, k: (q + k) / 2,  # the paper's default; bounds E[|q||k|] by the AM-GM inequality
        "qk_max": torch.maximum,
        "qk_product": lambda q, k: (q * k).sqrt(),  # the geometric mean, despite the paper's name for it
        "k_only": lambda q, k: k,
        "q_only": lambda q, k: q,
        "qk_mse": lambda q, k: q * k,  # weight of the squared logit error; unchanged by q -> c q, k -> k / c
    }
)


def block_energy(x: Tensor, pairs: Tensor) -> Tensor:
    """Mean over tokens of the squared norm of every RoPE block: x [H, N, D] and pairs [L, 2] give [H, L] float64."""
    power = torch.stack([head.double().square().mean(0) for head in x])  # head by head bounds the float64 copy
    return power[:, pairs[:, 0]] + power[:, pairs[:, 1]]


def score_blocks(keys: Tensor, queries: Tensor | None, pairs: Tensor, score: str = "qk_avg") -> Tensor:
    """Score [H, L] float64 of every RoPE block of every KV head.

    keys [H, N, D]; queries [Hq, N, D] or None, query head h belonging to KV head h // (Hq // H); pairs [L, 2] channel indices.
    Query energies are averaged over the query heads of a group separately: energies of averaged vectors would under-count.
    Raises ValueError for an unknown score, for missing queries and for head counts that do not divide.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}.")
    key_energy = block_energy(keys, pairs)
    if score == "k_only":
        return key_energy
    if queries is None:
        raise ValueError(f"score={score} needs calibration queries; without them only score=k_only is defined.")
    heads = keys.shape[0]
    if queries.shape[0] % heads:
        raise ValueError(f"{queries.shape[0]} query heads cannot be divided among {heads} key heads.")
    query_energy = block_energy(queries, pairs).unflatten(0, (heads, -1)).mean(1)
    return SCORES[score](query_energy, key_energy)
