"""Joint refit of residual codebooks (ours): all entries move at once to the least-squares fit of the vectors under their codes.

Stage-wise training leaves every stage blind to the later ones. For fixed codes the sum of entries is linear in the entries, so the best
ones solve normal equations whose matrix counts how often two entries meet (additive quantization: Babenko and Lempitsky 2014, Martinez et al. 2018).
Entries seen rarely would follow noise; a ridge of `RIDGE` pseudo-members pulls each to where it was.
"""

import torch
from torch import Tensor

from kernels import rvq
from kernels.kmeans import sums

RIDGE = 20.0
BLOCK = 4096  # unknown entries solved for at once; the stages outside are held fixed
UNIT = 2**20  # weights are counted in whole units of 2^-20, because integer sums do not depend on the order of a GPU's additions


def refit(x: Tensor, weights: Tensor | None, codebooks: Tensor, beam: int) -> Tensor:
    """New codebooks [G, R, K, D] float32 for x [G, N, D] and weights [G, N] or None, from codes found with `beam`."""
    codes = rvq.encode(x, codebooks, beam)
    books = codebooks.float().clone()
    step = max(1, BLOCK // books.shape[2])
    for g in range(books.shape[0]):
        weight = torch.ones_like(x[g, :, 0]) if weights is None else weights[g] / weights[g].mean()
        for begin in range(0, books.shape[1], step):
            stages = slice(begin, begin + step)
            rest = x[g] - rvq.decode(codes[g : g + 1], books[g : g + 1])[0]
            books[g, stages] += _correction(rest, weight, codes[g, :, stages], books.shape[2])
    return books


def _correction(rest: Tensor, weight: Tensor, codes: Tensor, entries: int) -> Tensor:
    # (A'WA + ridge) delta = A'W rest, A the one-hot matrix of the codes: what must be added to the entries of these stages.
    stages = codes.shape[1]
    size = stages * entries
    flat = codes + torch.arange(stages, device=codes.device) * entries
    units = (weight * UNIT).round().long()
    meetings = torch.zeros(size * size, dtype=torch.int64, device=rest.device)
    for stage in range(stages):
        meetings.index_add_(0, (flat[:, stage : stage + 1] * size + flat).flatten(), units[:, None].expand(-1, stages).flatten())
    normal = (meetings.view(size, size).double() / UNIT).to(rest.dtype)
    normal.diagonal().add_(RIDGE)
    pull = torch.cat([sums(rest[None], weight[None], codes[None, :, s], entries)[1][0] for s in range(stages)])
    return torch.cholesky_solve(pull, torch.linalg.cholesky(normal)).view(stages, entries, -1)
