"""A new token of vector-coded keys and values, written into its place: turned back, divided, coded stage by stage, each code a byte.

This file defines, with :func:`kernels.rvq.encode`; `kernels.append_triton` does the same in one launch. Codes are equal except at ties within rounding.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import backend, rvq

PIECES = (16, 32, 64, 128, 256)  # channels of a piece that the kernel serves
ENTRIES = 256
TILES = ((129, 32, 4), (9, 16, 4), (1, 8, 8))
"""From how many sequences on: sequences and warps of a program."""
DEPTH = 5
DEPTHS = {65536: 4, 131072: 2}
"""Stages of the loop, one more than the tables that shared memory holds at once, by bytes of a table; DEPTH for smaller ones."""


class Book(NamedTuple):
    """What codes one tensor's tokens: tables [M, R, K, D] and the power of two that x is divided by. Tables never change in place."""

    tables: Tensor
    unit: float


class Turn(NamedTuple):
    """What RoPE did to the new keys, channel i with i + D / 2: cos and sin [B, >= D / 2] float32 of their angles, both with the factor `gain`."""

    cos: Tensor
    sin: Tensor
    gain: float = 1.0

    def back(self, x: Tensor) -> Tensor:
        """x [B, H, D] as it was before, float32."""
        half = x.shape[-1] // 2
        (low, high), (cos, sin) = x.float().chunk(2, -1), ((t[:, None, :half] / self.gain**2) for t in (self.cos, self.sin))
        return torch.cat([low * cos + high * sin, high * cos - low * sin], -1)


def append(held: Sequence[Tensor], tokens: Sequence[Tensor], books: Sequence[Book], at: Tensor, turn: Turn | None = None) -> None:
    """Write the codes of tokens [B, H, 1, D] (any float dtype), keys and values, into held [B, 1, N, M * R] uint8 at token `at` ([1] int64, on the device).

    `turn`: keys come after RoPE and are coded before it. Reads nothing back to the host, so a graph can hold it. Raises ValueError for more than 256 entries.
    """
    if any(book.tables.shape[2] > ENTRIES for book in books):
        raise ValueError(f"A code is one byte: tables must have at most {ENTRIES} entries, not {[book.tables.shape[2] for book in books]}.")
    write = _launch if backend.use_triton(tokens[0]) and all(serves(book.tables) for book in books) else define
    write(held, tokens, books, at, turn)


def define(held: Sequence[Tensor], tokens: Sequence[Tensor], books: Sequence[Book], at: Tensor, turn: Turn | None = None) -> None:
    """What :func:`append` writes, in torch."""
    plain = [x[:, :, 0].float() for x in tokens]
    for codes, x, book in zip(held, plain if turn is None else (turn.back(plain[0]), plain[1]), books, strict=True):
        pieces = (x / book.unit).reshape(x.shape[0], -1, book.tables.shape[3])
        found = rvq.encode(pieces.transpose(0, 1), book.tables).transpose(0, 1)  # [B, M, R]
        codes.index_copy_(2, at, found.reshape(x.shape[0], 1, 1, -1).to(torch.uint8))


def serves(tables: Tensor) -> bool:
    """Whether the kernel takes such tables: 16- or 8-bit floats, 256 entries, pieces of 16 to 256 channels, a power of two."""
    return tables.dtype in (torch.float16, torch.float8_e4m3fn) and tables.shape[2] == ENTRIES and tables.shape[3] in PIECES


def _launch(held: Sequence[Tensor], tokens: Sequence[Tensor], books: Sequence[Book], at: Tensor, turn: Turn | None) -> None:
    from kernels.append_triton import append_token

    tokens = [x if x.stride(-1) == 1 else x.contiguous() for x in tokens]
    alike = len({(book.tables.shape, book.tables.dtype, x.dtype) for book, x in zip(books, tokens)}) == 1
    batch, _, _, dim = tokens[0].shape
    _, rows, warps = next(tile for tile in TILES if batch >= tile[0])
    for pair in ((0, 1),) if alike else ((0, 0), (1, 1)):  # what differs in shape takes a launch of its own
        (k, v), (kc, vc), (kx, vx) = ([of[i] for i in pair] for of in (books, held, tokens))
        pieces, stages, entries, width = k.tables.shape
        rows, warps = (rows, warps) if width < PIECES[-1] else (8, 8)  # more would spill
        turned = turn is not None and pair[0] == 0
        cos, sin, gain = turn if turned else (at, at, 1.0)
        append_token[-(-batch // rows), pieces, len(set(pair))](
            kx, vx, k.tables.contiguous(), v.tables.contiguous(), rvq.bias_of(k.tables), rvq.bias_of(v.tables), kc, vc, cos, sin, at,
            batch, 1 / (k.unit * gain**2), 1 / v.unit, *kx.stride()[:2], *vx.stride()[:2], kc.stride(0), vc.stride(0), cos.stride(0),
            PIECES=pieces, STAGES=stages, K=entries, D=width, DIM=dim, BN=rows, STACK=rows < 16, TURN=turned,
            R=1 << (stages - 1).bit_length(), DEPTH=DEPTHS.get(entries * width * k.tables.element_size(), DEPTH), num_warps=warps,
        )  # fmt: skip
