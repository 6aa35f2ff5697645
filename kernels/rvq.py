"""Residual vector quantization: the sum of one entry per stage, chosen greedily or by a beam, for many pieces at once."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.kmeans import nearest, product

SCORES = 2**20  # partial sums times entries that a beam holds at once on a CPU; a GPU gets 64 times as many


def encode(x: Tensor, codebooks: Tensor, beam: int = 1) -> Tensor:
    """Codes [G, N, R] (integers) of x [G, N, D] under codebooks [G, R, K, D]; distances in float32.

    beam=1 takes the nearest entry stage by stage. A wider beam keeps the `beam` best partial sums of every vector after each stage
    and returns the best whole sum; time grows in proportion, decoding does not change.
    """
    if x.is_cuda and codebooks.dtype in (torch.float16, torch.float8_e4m3fn):
        if beam == 1:
            from kernels import rvq_triton

            return rvq_triton.encode(x, codebooks)
        from kernels import rvq_beam_triton

        if rvq_beam_triton.serves(codebooks, beam):
            return rvq_beam_triton.encode(x, codebooks, beam)
    if beam == 1:
        return _greedy(x.float(), codebooks)
    stages, entries = codebooks.shape[1:3]
    codes = torch.empty(*x.shape[:2], stages, dtype=torch.int64, device=x.device)
    step = max(1, SCORES * (64 if x.is_cuda else 1) // (x.shape[0] * max(beam * entries, x.shape[2])))
    for begin in range(0, x.shape[1], step):
        rows = slice(begin, begin + step)
        codes[:, rows] = _beam(x[:, rows].float(), codebooks, beam)
    return codes


_biases = WeakTensorKeyDictionary()


def bias_of(codebooks: Tensor) -> Tensor:
    """-|entry|^2 / 2, float32 [G, R, K], of codebooks [G, R, K, D] that never change in place: kept as long as they live.

    Coding one token reads each table once; its norms would read it again and write it twice as large.
    """
    if codebooks not in _biases:
        _biases[codebooks] = codebooks.float().square().sum(-1) * -0.5
    return _biases[codebooks]


def decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Sum of the chosen entries, float32 [G, N, D], for codes [G, N, R] (integers) and codebooks [G, R, K, D].

    With codes of fewer stages than the codebooks have, the sum is the coarser code of that prefix.
    """
    total = 0
    for stage in range(codes.shape[-1]):
        total = total + rows_of(codebooks[:, stage], codes[..., stage])
    return total


def rows_of(codebook: Tensor, codes: Tensor) -> Tensor:
    """Entries [G, N, D] in float32 that codes [G, N] name in one stage's codebook [G, K, D]."""
    groups, entries, width = codebook.shape
    if codebook.element_size() == 1:
        codebook = codebook.half()  # exact; indexing of float8 is not everywhere
    flat = codes.long() + torch.arange(groups, device=codes.device)[:, None] * entries
    return codebook.reshape(-1, width).index_select(0, flat.flatten()).view(*codes.shape, width).float()


def _greedy(rest: Tensor, codebooks: Tensor) -> Tensor:
    codes = []
    for stage in range(codebooks.shape[1]):
        table = codebooks[:, stage].float()
        codes.append(nearest(rest, table)[0])
        rest = rest - rows_of(table, codes[-1])
    return torch.stack(codes, -1)


def _beam(rest: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    groups, n, width = rest.shape
    entries = codebooks.shape[2]
    rest, error = rest[:, :, None], rest.new_zeros(groups, n, 1)  # [G, N, b, D]; error up to the constant ||x||^2
    codes = torch.empty(groups, n, 1, 0, dtype=torch.int64, device=rest.device)
    for stage in range(codebooks.shape[1]):
        table = codebooks[:, stage].float()
        change = _change(rest.flatten(1, 2), table).view(groups, n, -1, entries)
        error = (error[..., None] + change).flatten(2)
        error, flat = error.topk(min(beam, error.shape[-1]), -1, largest=False)
        parent, code = flat // entries, flat % entries
        codes = torch.cat([codes.gather(2, parent[..., None].expand(-1, -1, -1, stage)), code[..., None]], -1)
        row = parent + torch.arange(groups * n, device=rest.device).view(groups, n, 1) * rest.shape[2]
        rest = rest.reshape(-1, width).index_select(0, row.flatten()).view(groups, -1, width)
        rest = rest.sub_(rows_of(table, code.flatten(1))).view(*row.shape, width)
    return codes[:, :, 0]


def _change(rest: Tensor, table: Tensor) -> Tensor:
    # ||rest - entry||^2 - ||rest||^2, [G, N, K]
    bias = table.square().sum(-1)
    if rest.is_cuda:
        return torch.baddbmm(bias[:, None], rest, table.mT, alpha=-2)
    return torch.stack([product(*group) for group in zip(rest, -2 * table, bias, strict=True)])
