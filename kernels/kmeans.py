"""Batched weighted clustering: nearest entries in L2, weighted sums, four starts, and one driver that takes the update rule as an argument.

Lloyd's rule (:func:`mean`) is here; the gain-shape rule of GSRQ (arXiv 2607.01065, Algorithm 1) is `gsrq.gskm.gain_shape`.
The start is separate from the rule because in high dimension it decides more than the rule does: an entry that is still one data
point wins nothing against an entry that already averages many, once D > 8 ln K.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

STARTS = ("random", "kmeans++", "spherical", "equal_norm")
EPS = 1e-12  # relative to the largest norm: shorter vectors have no direction
SCORES = 2**21  # scores held at once on a CPU (8 MiB); a GPU gets 32 times as many
SEEDING = 32  # k-means++ and the spherical warm-up look at no more than this many random vectors per entry

Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Clustering(NamedTuple):
    """Result of :func:`cluster` for G groups."""

    entries: Tensor  # [G, K, D] float32, the iterate with the least weighted squared error
    objective: list[list[float]]  # per group, the weighted squared error before each update and after the last
    reseeded: list[int]  # per group, how often an empty entry was given a new place


def nearest(x: Tensor, entries: Tensor, *, cosine: bool = False) -> tuple[Tensor, Tensor]:
    """Index of the entry nearest to each vector in L2, and its score x.c - ||c||^2 / 2 (so ||x - c||^2 = ||x||^2 - 2 score).

    x [G, N, D], entries [G, K, D], both float32; returns int64 [G, N] and float32 [G, N].
    With `cosine` the norms of the entries are ignored and the score is x.c. Ties go to either entry.
    """
    bias = torch.zeros_like(entries[:, None, :, 0]) if cosine else entries.square().sum(-1)[:, None] * -0.5
    step = max(1, SCORES * (32 if x.is_cuda else 1) // (entries.shape[0] * entries.shape[1]))
    labels, scores = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device), x.new_empty(x.shape[:2])
    for begin in range(0, x.shape[1], step):
        rows = slice(begin, begin + step)
        torch.max(torch.baddbmm(bias, x[:, rows], entries.mT), -1, out=(scores[:, rows], labels[:, rows]))
    return labels, scores


def sums(x: Tensor, weights: Tensor, labels: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Per entry, the summed weight [G, K] and the weighted sum of its members [G, K, D], in float32.

    x [G, N, D], weights [G, N], labels [G, N] int64.
    """
    # Atomic additions would make two calibrations with one seed differ, so a GPU multiplies by the one-hot matrix.
    return (_sums_one_hot if x.is_cuda else _sums_scatter)(x, weights, labels, entries)


def mean(x: Tensor, weights: Tensor, inverse: Tensor, labels: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Lloyd's update: each entry becomes the weighted mean of its members; an entry without members stays.

    x [G, N, D], weights and inverse norms [G, N], labels [G, N], entries [G, K, D]; returns the new entries and their mass [G, K].
    """
    mass, total = sums(x, weights, labels, entries.shape[1])
    means = total / mass.clamp_min(torch.finfo(x.dtype).tiny)[..., None]
    return torch.where(mass[..., None] > 0, means, entries), mass


def start(x: Tensor, weights: Tensor, inverse: Tensor, entries: int, how: str, warmup: int, generator: torch.Generator) -> Tensor:
    """First entries [G, K, D] for x [G, N, D], weights [G, N] and inverse norms [G, N] (0 for a zero vector).

    random: K distinct members. kmeans++: members drawn one by one in proportion to their weighted squared distance.
    spherical: random directions, `warmup` rounds of spherical k-means (on SEEDING vectors per entry), then the members' mean projection as gain.
    equal_norm: random directions with one common gain, the mean projection. Zero vectors are chosen last.
    """
    if how == "kmeans++":
        return _plusplus(x, weights, entries, generator)
    order = torch.rand(x.shape[:2], generator=generator).to(x.device) + (inverse > 0)
    sample = order.topk(min(x.shape[1], SEEDING * entries), -1).indices
    members = _take(x, sample[:, :entries])
    if how == "random":
        return members
    shapes = members * _take(inverse[..., None], sample[:, :entries])
    if how == "spherical" and warmup > 0:
        some = _take(x, sample)
        pull = (weights * inverse).gather(1, sample)
        for _ in range(warmup):
            _, total = sums(some, pull, nearest(some, shapes, cosine=True)[0], entries)
            length = total.norm(dim=-1, keepdim=True)
            shapes = torch.where(length > EPS, total / length.clamp_min(EPS), shapes)
    labels, projections = nearest(x, shapes, cosine=True)
    common = (weights * projections).sum(1) / weights.sum(1).clamp_min(torch.finfo(x.dtype).tiny)
    if how == "equal_norm":
        return shapes * common.clamp_min(0)[:, None, None]
    mass, total = sums(projections[..., None], weights, labels, entries)
    gains = torch.where(mass > 0, total[..., 0] / mass.clamp_min(torch.finfo(x.dtype).tiny), common[:, None])
    return shapes * gains.clamp_min(0)[..., None]


def cluster(
    x: Tensor,
    count: int,
    weights: Tensor | None = None,
    *,
    update: Update,
    start: str = "random",
    warmup: int = 3,
    rounds: int = 40,
    tolerance: float = 0.0,
    empty: str = "reseed",
    generator: torch.Generator,
) -> Clustering:
    """Alternate L2 assignment and `update` for G independent groups; keep the best iterate of each group.

    x [G, N, D] and weights [G, N] (None: all one), float32; `count` is K. `rounds` counts updates; with rounds=0 the start is returned
    (start="spherical", warmup=T, rounds=0 is spherical k-means with projection gains). A group stops when no assignment changes or,
    with tolerance > 0, when a round lowers its best weighted squared error by less than that fraction. An empty entry takes
    the direction of a vector drawn in proportion to its weighted error, with the median gain of its group (`empty`="reseed"),
    or stays (`empty`="keep"). Draws come from `generator` (a CPU generator). Raises ValueError for N < K and unknown options.
    """
    if start not in STARTS:
        raise ValueError(f"start={start!r} is unknown; choose one of {', '.join(STARTS)}.")
    if empty not in ("reseed", "keep"):
        raise ValueError(f"empty={empty!r} is unknown; choose reseed or keep.")
    if x.shape[1] < count:
        raise ValueError(f"{count} entries need at least {count} vectors to learn from, got {x.shape[1]}.")
    groups = x.shape[0]
    weights = torch.ones_like(x[..., 0]) if weights is None else weights
    norms = x.norm(dim=-1)
    inverse = torch.where(norms > EPS * norms.amax(1, keepdim=True), 1 / norms, torch.zeros_like(norms))
    centres = _start(x, weights, inverse, count, start, warmup, generator)
    best, lowest, labels = centres.clone(), [float("inf")] * groups, None
    objective, reseeded, active = [[] for _ in range(groups)], [0] * groups, list(range(groups))
    for done in range(rounds + 1):
        before = labels
        labels, scores = nearest(x, centres)
        errors = weights * (norms.square() - 2 * scores).clamp_min(0)
        totals = errors.sum(1, dtype=torch.float64).tolist()
        still = [done == 0 or bool((labels[i] != before[i]).any()) for i in range(len(active))]
        for i, group in enumerate(active):
            objective[group].append(totals[i])
            gain = lowest[group] - totals[i]
            if gain > 0:
                best[group], lowest[group] = centres[i], totals[i]
            if tolerance > 0 and done > 0 and gain <= tolerance * totals[i]:
                still[i] = False
        if done == rounds or not any(still):
            break
        if not all(still):
            keep = torch.tensor([i for i, going in enumerate(still) if going], device=x.device)
            active = [active[i] for i in keep.tolist()]
            x, weights, norms, inverse = x[keep], weights[keep], norms[keep], inverse[keep]
            labels, errors, centres = labels[keep], errors[keep], centres[keep]
        centres, mass = update(x, weights, inverse, labels, centres)
        if empty == "reseed":
            draws = torch.rand(groups, count, generator=generator)[active].to(x.device)
            centres, moved = _reseed(x, inverse, errors, centres, mass, draws)
            for group, number in zip(active, moved, strict=True):
                reseeded[group] += number
    return Clustering(best, objective, reseeded)


def kmeans(x: Tensor, count: int, weights: Tensor | None = None, *, start: str = "kmeans++", **options) -> Clustering:
    """Weighted k-means: :func:`cluster` with Lloyd's update; same arguments and errors."""
    return cluster(x, count, weights, update=mean, start=start, **options)


_start = start  # `cluster` has an argument of this name


def _sums_scatter(x: Tensor, weights: Tensor, labels: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    groups, _, width = x.shape
    flat = (labels + torch.arange(groups)[:, None] * entries).flatten()
    mass = x.new_zeros(groups * entries).index_add_(0, flat, weights.flatten())
    total = x.new_zeros(groups * entries, width).index_add_(0, flat, (x * weights[..., None]).flatten(0, 1))
    return mass.view(groups, entries), total.view(groups, entries, width)


def _sums_one_hot(x: Tensor, weights: Tensor, labels: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    groups, n, width = x.shape
    mass, total = x.new_zeros(groups, entries), x.new_zeros(groups, entries, width)
    step = max(1, SCORES * 32 // (groups * entries))
    for begin in range(0, n, step):
        rows = slice(begin, begin + step)
        member = x.new_zeros(*labels[:, rows].shape, entries)
        member.scatter_(2, labels[:, rows, None], weights[:, rows, None])
        mass += member.sum(1)
        total += member.mT @ x[:, rows]
    return mass, total


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _draw(mass: Tensor, uniform: Tensor) -> Tensor:
    # Inverse transform sampling in float64: a float32 running sum over 10^5 vectors would lose the small ones.
    steps = mass.double().cumsum(-1)
    return torch.searchsorted(steps, uniform.double() * steps[..., -1:], right=True).clamp_max(mass.shape[-1] - 1)


def _plusplus(x: Tensor, weights: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    if x.shape[1] > SEEDING * entries:
        sample = torch.randperm(x.shape[1], generator=generator)[: SEEDING * entries].to(x.device)
        x, weights = x[:, sample], weights[:, sample]
    uniform = torch.rand(entries, x.shape[0], 1, generator=generator).to(x.device)
    squares = x.square().sum(-1)
    distance, chosen = torch.full_like(squares, torch.inf), []
    for k in range(entries):
        odds = weights if k == 0 else weights * distance
        chosen.append(_take(x, _draw(odds, uniform[k])))
        new = squares - 2 * (x @ chosen[-1].mT)[..., 0] + chosen[-1].square().sum(-1)
        distance = torch.minimum(distance, new.clamp_min(0))
    return torch.cat(chosen, 1)


def _reseed(x: Tensor, inverse: Tensor, errors: Tensor, centres: Tensor, mass: Tensor, draws: Tensor) -> tuple[Tensor, list[int]]:
    hole = (mass <= 0) & (errors.sum(1, keepdim=True) > 0)
    counts = hole.sum(1).tolist()
    if not any(counts):
        return centres, counts
    chosen = _draw(errors, draws)
    gains = centres.norm(dim=-1).masked_fill(mass <= 0, torch.nan).nanmedian(1).values
    fresh = _take(x, chosen) * (_take(inverse[..., None], chosen) * gains[:, None, None])
    return torch.where(hole[..., None], fresh, centres), counts
