"""Where every channel of every KV head is stored: blocks sorted by width and cut into groups of one width (Block-GTQ).

A group is coded by one TurboQuant-MSE encoder: its own norm, its own rotation of size |group| x |group|.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_SEED, REST_SEED = 42, 99  # the public code's rotation seeds: 42 + width, and 99 for channels that RoPE leaves alone


@dataclass(frozen=True)
class Group:
    """Positions [start, start + size) of one head, coded at `width` bits with the rotation of (size, seed)."""

    head: int
    start: int
    size: int
    width: int
    seed: int


def unrotated(pairs: Tensor, head_dim: int) -> Tensor:
    """Channels [R] that no RoPE pair [L, 2] contains, ascending."""
    free = torch.ones(head_dim, dtype=torch.bool)
    free[pairs.flatten()] = False
    return free.nonzero()[:, 0]


def static_pairs(rest: Tensor) -> Tensor:
    """Pairs [R/2, 2] of unrotated channels, the first half with the second; raises ValueError if their number is odd."""
    if len(rest) % 2:
        raise ValueError(f"partial=full pairs the unrotated channels, but there are {len(rest)}; use partial=split or merge.")
    return rest.view(2, -1).T


def arrange(widths: Tensor, pairs: Tensor, rest: Tensor, rest_width: int, merge: bool) -> tuple[Tensor, list[Group]]:
    """Stored order of the channels [H, D] int64 and the groups, heads in order and widths ascending inside a head.

    widths [H, L] of the blocks pairs [L, 2]; the channels rest [R] are outside all blocks and have width rest_width: they join
    the group of that width if merge is set, else they form the last group of their head. Sorting is stable, block p of a group
    takes positions 2p and 2p + 1.
    """
    orders, groups = [], []
    for head, head_widths in enumerate(widths.tolist()):
        order: list[int] = []
        for width in sorted(set(head_widths) | ({rest_width} if merge and len(rest) else set())):
            members = [c for w, pair in zip(head_widths, pairs.tolist(), strict=True) if w == width for c in pair]
            members += rest.tolist() if merge and width == rest_width else []
            groups.append(Group(head, len(order), len(members), width, GROUP_SEED + width))
            order += members
        if not merge and len(rest):
            groups.append(Group(head, len(order), len(rest), rest_width, REST_SEED))
            order += rest.tolist()
        orders.append(order)
    return torch.tensor(orders), groups
