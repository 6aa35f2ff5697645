"""Triton: the queries of decode attention over pages, turned into stored positions: what `kernels.paged_triton` starts from.

Latency alone: a warp has one row of the rotation and every query of its head, and asks for all of them before it uses any.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4  # rows of a program, and its warps: each has one


@triton.jit
def rotate_query(
    query, matrix, sums, out, aux, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DPAD: tl.constexpr, TILE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out [B, H, ROWS, G] and aux [B, H, 2, G] from query [B, H GROUP, D], matrix [H, ROWS, D] and sums [H, 2, D]; see :func:`rotate`."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    place, extra = batch * HEADS + head, block == ROWS // TILE  # one program more for each head: its matrix is the sums
    d, row = tl.arange(0, DPAD)[None, :], tl.arange(0, TILE)[:, None]
    there = row < tl.where(extra, 2, TILE)
    r = tl.load(tl.where(extra, sums + head * 2 * DIM, matrix + (head * ROWS + block * TILE) * DIM) + row * DIM + d, mask=there & (d < DIM), other=0)
    q = ()
    for g in tl.static_range(GROUP):  # once for every row: each warp reads its own, and nothing passes between them
        q = q + (tl.load(query + (place * GROUP + g) * DIM + row * 0 + d, mask=there & (d < DIM), other=0),)
    r, turned = r * scale, tl.zeros([TILE, DPAD], tl.float32)
    for g in tl.static_range(GROUP):  # query g into column g: the sums lie as they did
        turned = tl.where(d == g, tl.sum(r * q[g].to(tl.float32), 1)[:, None], turned)
    if extra:
        tl.store(aux + (place * 2 + row) * G + d, turned, mask=there & (d < G))
    else:
        tl.store(out + (place * ROWS + block * TILE + row) * G + d, turned.to(out.dtype.element_ty), mask=there & (d < G))


def rotate(query: Tensor, matrix: Tensor, sums: Tensor, scale: float, early: bool = False) -> tuple[Tensor, Tensor]:
    """query [B, Hq, D], scaled, in stored positions [B, H, R, G] and its sums [B, H, 2, G] float32; query head h belongs to KV head h // (Hq // H).

    matrix [H, R, D] float32: the rows of the rotation at each stored position, R a multiple of 4; sums [H, 2, D] float32: the keys' mean
    and the rows' sum. G is a power of two of at least 8; what stands behind the last query is 0. float16 unless queries are float32.
    early: the kernel behind it waits for it (:func:`kernels.backend.early`).
    """
    (batch, count, dim), (heads, rows, _) = query.shape, matrix.shape
    group, device = count // heads, query.device
    wide = max(8, 1 << (group - 1).bit_length())
    turned = torch.empty(batch, heads, rows, wide, dtype=torch.float32 if query.dtype == torch.float32 else torch.float16, device=device)
    aux = torch.empty(batch, heads, 2, wide, device=device)
    rotate_query[(rows // TILE + 1, heads, batch)](
        query.contiguous(), matrix, sums, turned, aux, scale, heads, group, wide, rows, dim, max(wide, 1 << (dim - 1).bit_length()), TILE, early, num_warps=TILE
    )
    return turned, aux
