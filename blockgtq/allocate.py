"""Integer bit widths of RoPE blocks under a budget (Block-GTQ, arXiv 2606.24033, greedy allocation).

Minimises J(b) = sum_i s_i 4^(-b_i) over integers with b_min <= b_i <= b_max and sum b_i = B. Raising b to b + 1 gains
3/4 s_i 4^(-b); the gains of one block fall geometrically, so handing out bits one by one to the largest gain is optimal, and
is the same as taking the B - L b_min largest gains of all. Away from the limits b_i is about mean + log2(s_i / geomean s) / 2.
"""

import torch
from torch import Tensor


def block_budget(blocks: int, bits: float) -> int:
    """Block-bits B = floor(blocks * bits): the sum of the widths when the code spends `bits` bits per dimension."""
    return int(blocks * bits + 1e-9)  # 1e-9: 100 * 2.3 must not become 229


def allocate(scores: Tensor, budget: int, b_min: int = 1, b_max: int = 8) -> Tensor:
    """Optimal widths [H, L] int64 for scores [H, L] >= 0; every head spends exactly `budget` block-bits.

    Among equal gains the lowest block index comes first. Raises ValueError if the budget is outside L * [b_min, b_max], or a
    score is negative or not finite.
    """
    blocks = scores.shape[-1]
    if not 0 <= b_min <= b_max:
        raise ValueError(f"b_min={b_min} and b_max={b_max} must satisfy 0 <= b_min <= b_max.")
    if not blocks * b_min <= budget <= blocks * b_max:
        raise ValueError(f"{budget} block-bits do not fit {blocks} blocks of {b_min} to {b_max} bits.")
    if not torch.isfinite(scores).all() or (scores < 0).any():
        raise ValueError("Scores must be finite and not negative; check the calibration activations.")
    levels = torch.arange(b_min, b_max, dtype=torch.float64, device=scores.device)
    gains = scores.double().unsqueeze(-1) * 4.0**-levels  # [H, L, b_max - b_min], falling along the last axis
    order = gains.flatten(1).argsort(dim=1, descending=True, stable=True)
    taken = torch.zeros_like(order).scatter_(1, order[:, : budget - blocks * b_min], 1)
    return b_min + taken.unflatten(1, (blocks, b_max - b_min)).sum(-1)


def allocate_tiles(scores: Tensor, bits: float, tile: int = 1, b_min: int = 1, b_max: int = 8) -> Tensor:
    """Widths [H, L] int64 of at most `bits` per channel on average that every `tile` blocks share, blocks of like score together (ours; the paper has tile=1).

    A kernel reads 16 channels, eight blocks, at a time: groups of whole tiles leave none of it idle, and there are fewer of them. Blocks are
    sorted by score and cut into tiles, which compete by their sums; widths fall with scores in any best solution, so this is the best one.
    Raises ValueError if tiles do not divide the blocks, or as :func:`allocate`.
    """
    blocks = scores.shape[-1]
    if tile < 1 or blocks % tile:
        raise ValueError(f"tile={tile} does not divide {blocks} blocks; choose a divisor (8 fills the tiles of the kernels).")
    if tile == 1:  # in the blocks' own order, which decides between equal gains
        return allocate(scores, block_budget(blocks, bits), b_min, b_max)
    order = scores.argsort(dim=1, descending=True, stable=True)
    sums = scores.gather(1, order).unflatten(1, (-1, tile)).sum(-1)
    widths = allocate(sums, block_budget(blocks // tile, bits), b_min, b_max)
    return torch.empty_like(order).scatter_(1, order, widths.repeat_interleave(tile, 1))


def objective(scores: Tensor, widths: Tensor) -> Tensor:
    """J = sum_i s_i 4^(-b_i) over the last axis, float64."""
    return (scores.double() * 4.0 ** -widths.double()).sum(-1)
