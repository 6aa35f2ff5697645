"""One launch for a new token of vector codes against its definition and the codec itself; bytes around the written ones stay as they are."""

import pytest
import torch

from kernels import backend, rvq
from kernels.append import Book, Turn, append, define

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not backend._installed(), reason="Triton is not installed here")


def problem(batch, heads, dim, piece, stages, table=torch.float16, dtype=torch.float16, gain=1.0, apart=False):
    """What `append` takes; positions of left-padded sequences, keys and values that are parts of one projection, codes of 6 tokens that are all 170."""
    draw = torch.Generator().manual_seed(batch * dim + piece)
    books, held = [], []
    for unit, width in ((0.5, piece), (4.0, 2 * piece if apart else piece)):
        pieces = heads * dim // width
        books.append(Book((0.5 * torch.randn(pieces, stages, 256, width, generator=draw)).to(table).to(DEVICE), unit))
        held.append(torch.full((batch, 1, 6, pieces * stages), 170, dtype=torch.uint8, device=DEVICE))
    both = torch.randn(batch, 2 * heads, 1, dim, generator=draw).to(dtype).to(DEVICE)
    angle = (90000 - 11 * torch.arange(batch)[:, None]) * 5e5 ** (-torch.arange(dim // 2) / (dim // 2))
    angle = torch.cat([angle, angle], 1).float()
    turn = Turn((gain * angle.cos()).to(DEVICE), (gain * angle.sin()).to(DEVICE), gain)
    return held, both.split(heads, 1), books, torch.tensor([3], device=DEVICE), turn


def compare(held, expected, tokens, books, turn):
    """Codes equal but for near ties, which cost no error; everything beside token 3 untouched."""
    for i, (codes, right, x, book) in enumerate(zip(held, expected, tokens, books)):
        assert (codes[:, :, [0, 1, 2, 4, 5]] == 170).all()
        assert (codes[:, :, 3] == right[:, :, 3]).float().mean() > 0.97
        x = turn.back(x[:, :, 0]) if turn and i == 0 else x[:, :, 0].float()
        pieces, stages, _, width = book.tables.shape
        x = (x / book.unit).reshape(-1, pieces, width).transpose(0, 1)
        errors = [(x - rvq.decode(c[:, 0, 3].long().view(-1, pieces, stages).transpose(0, 1), book.tables)).square().sum().item() for c in (codes, right)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-5)


FP8 = torch.float8_e4m3fn
CASES = {
    "four pieces a head": (1, 2, 128, 32, 4),
    "eight bits": (3, 2, 128, 32, 4, FP8),
    "a head": (2, 2, 64, 64, 3, torch.float16, torch.bfloat16),
    "sixteen stages": (1, 1, 128, 128, 16),
    "two heads, a scaled rotation": (1, 2, 32, 64, 2, torch.float16, torch.float32, 1.25),
    "full tiles of sixteen": (11, 1, 64, 16, 2, FP8, torch.bfloat16),
    "more than one tile": (131, 1, 32, 16, 1),
    "keys and values in pieces of their own": (2, 2, 64, 32, 2, torch.float16, torch.float16, 1.0, True),
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_the_definition(case):
    held, *rest = problem(*CASES[case])
    for turn in (rest[-1], None):
        found, expected = ([codes.clone() for codes in held] for _ in range(2))
        define(expected, *rest[:-1], turn)
        append(found, *rest[:-1], turn)
        compare(found, expected, *rest[:2], turn)


def test_it_is_one_launch_and_another_where_shapes_differ(monkeypatch):
    from kernels import append_triton

    grids, real = [], append_triton.append_token

    class Counted:
        def __getitem__(self, grid):
            grids.append(grid)
            return real[grid]

    monkeypatch.setattr(append_triton, "append_token", Counted())
    append(*problem(9, 2, 64, 32, 1))
    append(*problem(1, 2, 64, 32, 1, apart=True))
    assert grids == [(1, 4, 2), (1, 4, 1), (1, 2, 1)]


@pytest.mark.parametrize("width,dtype", [(24, torch.float16), (8, torch.float16), (32, torch.float32)])
def test_what_the_kernel_does_not_take_is_coded_as_defined(width, dtype):
    held, tokens, books, at, turn = problem(2, 3, 32, 16, 2)
    books = [Book(torch.randn(96 // width, 2, 256, width).to(dtype).to(DEVICE), 2.0) for _ in books]
    held = [torch.full((2, 1, 6, 96 // width * 2), 170, dtype=torch.uint8, device=DEVICE) for _ in books]
    append(held, tokens, books, at, turn)
    for codes, x, book in zip(held, (turn.back(tokens[0][:, :, 0]), tokens[1][:, :, 0].float()), books):
        assert torch.equal(codes[:, 0, 3].long().view(2, -1, 2).transpose(0, 1), rvq.encode((x / 2).reshape(2, -1, width).transpose(0, 1), book.tables).long())
        assert (codes[:, :, [0, 1, 2, 4, 5]] == 170).all()


def test_codes_that_are_no_bytes_are_refused():
    held, tokens, books, at, turn = problem(1, 1, 32, 16, 1)
    with pytest.raises(ValueError, match="at most 256 entries"):
        append(held, tokens, [Book(book.tables.repeat(1, 1, 2, 1), 1.0) for book in books], at, turn)


def test_turning_back_undoes_the_rotation():
    from kernels.lookup import rotate

    x = torch.randn(2, 3, 1, 32)
    inv_freq = 1e4 ** (-torch.arange(16) / 16)
    base = torch.tensor([5, 1000])
    angle = base[:, None] * inv_freq
    torch.testing.assert_close(Turn(2 * angle.cos(), 2 * angle.sin(), 2.0).back(2 * rotate(x, inv_freq, base)[:, :, 0]), x[:, :, 0], rtol=1e-5, atol=1e-5)
