"""The gain-shape update on CUDA tensors: members added by `kernels.kmeans_triton`, everything after that in one launch.

Obeys `gsrq.gskm.gain_shape`, whose twenty small operations per round would cost a host thread more time than the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import kmeans_triton
from kernels.kmeans import EPS, TINY


@triton.jit
def _update(
    total, mass, entries, out, heavy, count, D: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, TINY: tl.constexpr
):  # fmt: skip
    # total [PARTS, 2, count, D], mass [PARTS, count]; one entry of out [count, D] and heavy [count] per program
    entry, d = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    real = d < D
    sums, units, weight = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32), 0.0
    for part in range(PARTS):
        sums += tl.load(total + (part * 2 * count + entry) * D + d, mask=real, other=0.0)
        units += tl.load(total + ((part * 2 + 1) * count + entry) * D + d, mask=real, other=0.0)
        weight += tl.load(mass + part * count + entry)
    own = tl.load(entries + entry * D + d, mask=real, other=0.0)
    length = tl.sqrt(tl.sum(units * units, 0))
    shape = own / tl.maximum(tl.sqrt(tl.sum(own * own, 0)), TINY)
    shape = tl.where(length > EPS * weight, units / tl.maximum(length, TINY), shape)
    gain = tl.maximum(tl.sum(shape * sums, 0) / tl.maximum(weight, TINY), 0.0)
    tl.store(out + entry * D + d, tl.where(weight > 0, shape * gain, own), mask=real)
    tl.store(heavy + entry, weight)


def gain_shape(x: Tensor, weights: Tensor, inverse: Tensor, labels: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`gsrq.gskm.gain_shape`: new entries [G, K, D] and their mass [G, K], float32."""
    mass, total = kmeans_triton.shares(x, weights, labels, entries.shape[1], inverse)
    entries = entries.contiguous()
    out, heavy, width = torch.empty_like(entries), torch.empty_like(mass[0]), entries.shape[2]
    _update[heavy.numel(),](
        total, mass, entries, out, heavy, heavy.numel(),
        D=width, BD=max(16, triton.next_power_of_2(width)), PARTS=len(mass), EPS=EPS, TINY=TINY, num_warps=1,
    )  # fmt: skip
    return out, heavy
