"""How both decode kernels over residual codes divide tables and tokens among programs, so that the rows of a program stay in the first-level cache.

Both products of attention are linear in the stages and in the channels. A program stays with one KV head and a share of its rows (some pieces,
or some stages of all of them) for a long stretch of tokens. Two programs fit a multiprocessor; programs MULTIPROCESSORS apart use the same
rows, so that whichever two meet share a cache.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kernels.lookup_rows_triton import Layout

MULTIPROCESSORS = 132
TWICE = 2  # programs of a multiprocessor that use the same rows
FEW = 128  # fewest tokens worth a program of their own
CACHE = 128 * 1024  # bytes of rows a program keeps returning to; a multiprocessor has 256 KB for them, codes and shared memory
DEEPEST = 4  # stages of a share: a word of codes has four bytes
LIMIT = {"num_warps": 8, "maxnreg": 128}  # what lets two programs share a multiprocessor


class Share(NamedTuple):
    """How the rows of one head are divided among programs: pieces into `slices`, stages into groups of `depth`."""

    slices: int
    depth: int
    groups: int


def divide(rows: Layout, dim: int, width: int, narrowest: int = 16) -> Share:
    """The fewest shares whose rows take at most CACHE bytes, entries being `width` bytes: by pieces first, which does nothing twice, then by stages.

    A share has at most DEEPEST stages, whose codes are one word, and at least `narrowest` channels (of each half, for keys).
    """
    slices = 1
    while min(rows.R, DEEPEST) * rows.K * dim // slices * width > CACHE and slices < rows.PARTS and 2 * narrowest * slices <= rows.PARTS * rows.W and not rows.SHARED:
        slices *= 2
    held = rows.K * (rows.PIECE if rows.SHARED else dim // slices) * width
    depth = max((d for d in range(1, DEEPEST + 1) if rows.R % d == 0 and d * held <= CACHE), default=1)
    return Share(slices, depth, rows.R // depth)


def spread(tables: int, batches: int, tokens: int, tile: int) -> tuple[int, int, int, int]:
    """`tables` shares of rows times `batches` sequences over the device: (lanes, splits, tokens of a stretch, programs of the grid).

    A lane is TWICE programs with the same rows; a table and sequence has `splits` lanes, TWICE * splits stretches of whole tiles.
    """
    units = tables * batches
    splits = max(1, min(triton.cdiv(tokens, FEW * TWICE), MULTIPROCESSORS // units))
    share = tile * triton.cdiv(tokens, tile * TWICE * splits)
    return units * splits, splits, share, triton.cdiv(units * splits, MULTIPROCESSORS) * MULTIPROCESSORS * TWICE


@triton.jit
def task(lanes, splits, batches, MULTIPROCESSORS: tl.constexpr, TWICE: tl.constexpr):
    """(whether there is work, table, sequence, stretch of tokens) of a program, as `spread` counts them.

    Tables are slowest, so that a multiprocessor changes its rows rarely.
    """
    program = tl.program_id(0)
    wave, within = program // (MULTIPROCESSORS * TWICE), program % (MULTIPROCESSORS * TWICE)
    lane = wave * MULTIPROCESSORS + within % MULTIPROCESSORS
    stretch = lane % splits * TWICE + within // MULTIPROCESSORS
    return lane < lanes, lane // splits // batches, lane // splits % batches, stretch
