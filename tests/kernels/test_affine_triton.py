"""Levels that are consecutive integers: exactly what a table of them says, for every code in every place."""

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402  (needs triton)

from kernels import affine_triton, backend  # noqa: E402
from kernels.paged import level_bytes  # noqa: E402
from kernels.scalar import consecutive  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def spell(words, at, zero, out, ASM: tl.constexpr):
    """out [8, 16, 32]: the levels of words [16, 32] in a layout of the compiler's choice."""
    place = tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :]
    y = affine_triton.levels(tl.load(words + place), affine_triton.table(at, tl.load(zero + tl.zeros([1, 1], tl.int32))), ASM)
    for j in tl.static_range(8):
        tl.store(out + j * 512 + place, y[j])


@pytest.mark.parametrize("first", [0, -8, 1, -1009, 900])
def test_integers_are_exact(first):
    words = torch.randint(-(2**31), 2**31 - 1, (16, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(DEVICE)
    table = level_bytes((torch.arange(16) + first).half()).to(DEVICE)
    found = torch.full((8, 16, 32), float("nan"), dtype=torch.float16, device=DEVICE)
    spell[(1,)](words, table, torch.zeros(1, dtype=torch.int32, device=DEVICE), found, backend.ASM, num_warps=1)
    shift = 4 * torch.arange(8, device=DEVICE)[:, None, None]
    assert torch.equal(found.float(), ((words.long() >> shift) & 15).float() + first)


def test_only_consecutive_integers_are():
    assert consecutive(torch.arange(16.0)) and consecutive(torch.arange(4.0) - 2) and consecutive(torch.tensor([3.0]))
    for levels in (torch.arange(16.0) / 2, torch.arange(4.0) - 0.5, torch.tensor([0.0, 1.0, 3.0]), torch.arange(16.0) + 1020, torch.tensor([0.0, float("nan")])):
        assert not consecutive(levels)
