"""Batched weighted clustering: nearest entries in L2, weighted sums, four starts, and one driver that takes the update rule as an argument.

CPU tensors are computed here, CUDA tensors by `kernels.kmeans_triton`; both give the same up to rounding.

Lloyd's rule (:func:`mean`) is here; the gain-shape rule of GSRQ (arXiv 2607.01065, Algorithm 1) is `gsrq.gskm.gain_shape`.
The start is separate from the rule because in high dimension it decides more than the rule does: an entry that is still one data
point wins nothing against an entry that already averages many, once D > 8 ln K.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear, max_pool2d

from kernels.draws import by_mass, draw_ahead, drawn

STARTS = ("random", "kmeans++", "spherical", "equal_norm")
TINY = torch.finfo(torch.float32).tiny
EPS = 1e-12  # relative to the largest norm: shorter vectors have no direction
SCORES = 2**19  # scores held at once on a CPU: 2 MiB, about a cache of two cores
LANES = 256  # vectors whose maxima are found side by side on a CPU
FEW = 64  # below so many vectors one batched product beats one product per group
SEEDING = 32  # k-means++ and the spherical warm-up look at no more than this many random vectors per entry
AHEAD = torch.cuda.is_available()  # whether the next start is drawn during the rounds; without a GPU they leave no core idle

Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Clustering(NamedTuple):
    """Result of :func:`cluster` for G groups."""

    entries: Tensor  # [G, K, D] float32, the iterate with the least weighted squared error
    objective: list[list[float]]  # per group, the weighted squared error before each update and after the last
    reseeded: list[int]  # per group, how often an empty entry was given a new place


def nearest(x: Tensor, entries: Tensor, *, cosine: bool = False) -> tuple[Tensor, Tensor]:
    """Index of the entry nearest to each vector in L2, and its score x.c - ||c||^2 / 2 (so ||x - c||^2 = ||x||^2 - 2 score).

    x [G, N, D], entries [G, K, D]; returns integers [G, N] (int64, on CUDA int32) and float32 [G, N].
    With `cosine` the norms of the entries are ignored and the score is x.c. Ties go to either entry. Both are float32 on a CPU;
    on CUDA x is float16, bfloat16 or float32 and the product is taken in its precision (float32: tf32) with entries rounded to it.
    """
    bias = torch.zeros_like(entries[..., 0]) if cosine else _bias(x, entries)
    if x.is_cuda:
        from kernels import kmeans_triton

        return kmeans_triton.nearest(x, entries, bias)
    if x.shape[1] < FEW:
        scores, labels = torch.baddbmm(bias[:, None], x, entries.mT).max(-1)
        return labels, scores
    labels, scores = torch.empty(x.shape[:2], dtype=torch.int64), x.new_empty(x.shape[:2])
    step = LANES * max(1, SCORES // (LANES * entries.shape[1]))
    for group, (own, table, offset) in enumerate(zip(x, entries, bias, strict=True)):
        for begin in range(0, x.shape[1], step):
            rows = slice(begin, begin + step)
            labels[group, rows], scores[group, rows] = _nearest(own[rows], table, offset)
    return labels, scores


def sums(x: Tensor, weights: Tensor, labels: Tensor, entries: int, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Per entry, the summed weight [G, K] and the weighted sum of its members [G, K, D], in float32.

    x [G, N, D], labels [G, N] integers, weights [G, N]. With `factor` [G, N] two sums [2, G, K, D] from one reading of x: under weights and
    under weights * factor. Equal inputs give equal bits: members are added in the order of a stable sort, never by atomics.
    """
    if x.is_cuda:
        from kernels import kmeans_triton

        mass, total = kmeans_triton.sums(x, weights, labels, entries, factor)
    else:
        mass, total = _sums(x, weights, labels, entries, factor)
    return mass, total[0] if factor is None else total


def mean(x: Tensor, weights: Tensor, inverse: Tensor, labels: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Lloyd's update: each entry becomes the weighted mean of its members; an entry without members stays.

    x [G, N, D], weights and inverse norms [G, N], labels [G, N], entries [G, K, D]; returns the new entries and their mass [G, K].
    """
    mass, total = sums(x, weights, labels, entries.shape[1])
    means = total / mass.clamp_min(TINY)[..., None]
    return torch.where(mass[..., None] > 0, means, entries), mass


def start(x: Tensor, weights: Tensor, inverse: Tensor, entries: int, how: str, warmup: int, generator: torch.Generator) -> Tensor:
    """First entries [G, K, D] for x [G, N, D], weights [G, N] and inverse norms [G, N] (0 for a zero vector).

    random: K distinct members. kmeans++: members drawn one by one in proportion to their weighted squared distance.
    spherical: random directions, `warmup` rounds of spherical k-means (on SEEDING vectors per entry), then the members' mean projection as gain.
    equal_norm: random directions with one common gain, the mean projection. Zero vectors are chosen last.
    """
    if how == "kmeans++":
        return _plusplus(x, weights, entries, generator)
    order = drawn(x.shape[:2], generator).to(x.device) + (inverse > 0)
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
    common = (weights * projections).sum(1) / weights.sum(1).clamp_min(TINY)
    if how == "equal_norm":
        return shapes * common.clamp_min(0)[:, None, None]
    mass, total = sums(projections[..., None], weights, labels, entries)
    gains = torch.where(mass > 0, total[..., 0] / mass.clamp_min(TINY), common[:, None])
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
    x, unit = _compact(x)
    weights = torch.ones(x.shape[:2], device=x.device) if weights is None else weights.float()
    norms = x.norm(dim=-1, dtype=torch.float32)
    inverse = torch.where(norms > EPS * norms.amax(1, keepdim=True), 1 / norms, torch.zeros_like(norms))
    data, squares = (x, weights, inverse), norms.square()
    centres = _start(*data, count, start, warmup, generator)
    if AHEAD and start != "kmeans++":
        draw_ahead(x.shape[:2], generator, [(len(x), count)] * rounds if empty == "reseed" else [])
    labels, errors, facts = _assess(data, squares, centres)
    groups = len(x)
    best, lowest, units = centres.clone(), [float("inf")] * groups, unit.square().flatten().tolist()
    objective, reseeded, active = [[] for _ in range(groups)], [0] * groups, list(range(groups))
    for done in range(rounds + 1):
        still, better = [bool(moved) for moved in facts[1]], []
        for i, (group, total) in enumerate(zip(active, facts[0], strict=True)):
            objective[group].append(total * units[group])
            gain = lowest[group] - total
            better.append(gain > 0)
            lowest[group] = min(lowest[group], total)
            if tolerance > 0 and done > 0 and gain <= tolerance * total:
                still[i] = False
        if all(better) and len(active) == groups:
            best = centres
        else:
            for i, group in enumerate(active):
                if better[i]:
                    best[group] = centres[i]
        if done == rounds or not any(still):
            break
        if not all(still):
            keep = torch.tensor([i for i, going in enumerate(still) if going], device=x.device)
            active = [active[i] for i in keep.tolist()]
            data, squares = tuple(part[keep] for part in data), squares[keep]
            labels, errors, centres = labels[keep], errors[keep], centres[keep]
        centres, mass = update(*data, labels, centres)
        # The next assignment is queued before anything is read back, so that a GPU does not wait; it is repeated if entries were empty.
        holes = mass <= 0 if empty == "reseed" else None
        draws = torch.rand(groups, count, generator=generator)[active] if empty == "reseed" else None
        before, old = labels, errors
        labels, errors, facts = _assess(data, squares, centres, before, holes)
        if any(facts[2]):
            holes &= old.sum(1, keepdim=True) > 0
            for group, number in zip(active, holes.sum(1).tolist(), strict=True):
                reseeded[group] += number
            centres = _reseed(data[0], data[2], old, centres, mass, holes, draws.to(x.device))
            labels, errors, facts = _assess(data, squares, centres, before)
    return Clustering(best * unit, objective, reseeded)


def kmeans(x: Tensor, count: int, weights: Tensor | None = None, *, start: str = "kmeans++", **options) -> Clustering:
    """Weighted k-means: :func:`cluster` with Lloyd's update; same arguments and errors."""
    return cluster(x, count, weights, update=mean, start=start, **options)


_start = start  # `cluster` has an argument of this name


def product(x: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, D] times table [K, D] transposed, plus bias [K]: float32 [n, K], on a CPU.

    MKL, which serves `linear`, keeps to 256-bit registers on AMD processors; oneDNN does not and takes half the time there.
    """
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, table, bias, "none", [], "")
    return linear(x, table, bias)


def _nearest(x: Tensor, table: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = product(table, x).add_(bias[:, None])  # [K, n]
    # A maximum with its index is scalar code in `max` but vector code, over `lanes` channels, in a channels-last pooling.
    lanes = LANES if len(x) % LANES == 0 else len(x)
    columns = scores.view(1, len(table), -1, lanes).permute(0, 3, 1, 2)
    top, place = max_pool2d(columns, (len(table), 1), return_indices=True)
    return (place[0, :, 0] // columns.shape[3]).T.flatten(), top[0, :, 0].T.flatten()


def _sums(x: Tensor, weights: Tensor, labels: Tensor, entries: int, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    groups, _, width = x.shape
    flat = (labels + torch.arange(groups)[:, None] * entries).flatten()
    members, order = flat.sort(stable=True)
    bounds = torch.searchsorted(members, torch.arange(groups * entries))
    mass = torch.bincount(flat, weights.flatten(), groups * entries)
    # Rows of x are added in place by sorted position: no weighted copy of x, and parallel over entries.
    several = [weights] if factor is None else [weights, weights * factor]
    total = [embedding_bag(order, x.reshape(-1, width), bounds, mode="sum", per_sample_weights=row.flatten()[order]) for row in several]
    return mass.view(groups, entries), torch.stack(total).view(-1, groups, entries, width)


def _compact(x: Tensor) -> tuple[Tensor, Tensor]:
    # float16 keeps the eleven bits of tf32 at half the bytes; a power of two per group keeps any range inside it, exactly.
    if x.dtype != torch.float32 or not x.is_cuda:
        return x, x.new_ones(len(x), 1, 1, dtype=torch.float32)
    low, high = x.flatten(1).aminmax(dim=1)
    unit = torch.exp2(torch.maximum(-low, high).clamp_min(TINY).log2().ceil() - 12)[:, None, None]
    return torch.div(x, unit, out=torch.empty_like(x, dtype=torch.float16)), unit


def _bias(x: Tensor, entries: Tensor) -> Tensor:
    return entries.to(x.dtype).float().square().sum(-1) * -0.5


def _assess(data: tuple[Tensor, ...], squares: Tensor, centres: Tensor, before: Tensor | None = None, holes: Tensor | None = None):
    """Labels, weighted squared errors [G, N], and lists over groups: total error, number of labels that changed, empty entries."""
    x, weights, _ = data
    if x.is_cuda:
        from kernels import kmeans_triton

        labels, errors, facts = kmeans_triton.assess(x, centres, weights, squares, before)
    else:
        labels, scores = nearest(x, centres)
        errors = weights * (squares - 2 * scores).clamp_min(0)
        changed = labels != (-1 if before is None else before)
        facts = torch.stack([errors.sum(1, dtype=torch.float64), changed.sum(1).double()], 1)
    empty = torch.zeros(len(x), 1, device=x.device) if holes is None else holes.sum(1, keepdim=True)
    return labels, errors, torch.cat([facts, empty], 1).T.tolist()


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])).float()


def _plusplus(x: Tensor, weights: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    if x.shape[1] > SEEDING * entries:
        sample = torch.randperm(x.shape[1], generator=generator)[: SEEDING * entries].to(x.device)
        x, weights = x[:, sample], weights[:, sample]
    x = x.float()
    columns = x.mT.contiguous()
    uniform = torch.rand(entries, x.shape[0], 1, generator=generator).to(x.device)
    squares = x.square().sum(-1)
    distance, chosen = torch.full_like(squares, torch.inf), []
    for k in range(entries):
        odds = weights if k == 0 else weights * distance
        chosen.append(_take(x, by_mass(odds, uniform[k])))
        new = torch.baddbmm(squares[:, None], chosen[-1], columns, alpha=-2)[:, 0] + chosen[-1].square().sum(-1)
        distance = torch.minimum(distance, new.clamp_min(0))
    return torch.cat(chosen, 1)


def _reseed(x: Tensor, inverse: Tensor, errors: Tensor, centres: Tensor, mass: Tensor, holes: Tensor, draws: Tensor) -> Tensor:
    chosen = by_mass(errors, draws)
    gains = centres.norm(dim=-1).masked_fill(mass <= 0, torch.nan).nanmedian(1).values
    fresh = _take(x, chosen) * (_take(inverse[..., None], chosen) * gains[:, None, None])
    return torch.where(holes[..., None], fresh, centres)
