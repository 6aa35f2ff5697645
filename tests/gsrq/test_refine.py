"""Joint refits: never worse under fixed codes, better on vectors not seen, equal to least squares where that is well posed."""

import pytest
import torch

from gsrq import GSRQ
from gsrq.refine import refit
from kernels import rvq
from kvq.quantizer import Calibration


def _books(x, stages, entries, seed=0):
    from kernels.kmeans import kmeans

    generator, rest, books = torch.Generator().manual_seed(seed), x.clone(), []
    for _ in range(stages):
        books.append(kmeans(rest, entries, generator=generator, rounds=10).entries)
        rest -= rvq.decode(rvq.encode(rest, books[-1][:, None]), books[-1][:, None])
    return torch.stack(books, 1)


def _error(x, codes, books, weights=None):
    squares = (x - rvq.decode(codes, books)).square().sum(-1)
    return float((squares if weights is None else squares * weights).sum())


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(16, 16, generator=generator)
    return torch.randn(2, 6000, 16, generator=generator) @ mix


@pytest.mark.parametrize("weighted", [False, True])
def test_fixed_codes_are_fitted_better(data, weighted):
    x = data[:, :4000]
    weights = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(2)) + 0.1 if weighted else None
    books = _books(x, 4, 16)
    codes = rvq.encode(x, books, 1)
    assert _error(x, codes, refit(x, weights, books, 1), weights) < 0.995 * _error(x, codes, books, weights)


def test_it_is_the_least_squares_solution_up_to_the_ridge(data, monkeypatch):
    x = data[:1, :4000]
    books = _books(x, 3, 8)
    codes = rvq.encode(x, books, 1)
    monkeypatch.setattr("gsrq.refine.RIDGE", 1e-3)
    member = torch.nn.functional.one_hot(codes[0], 8).flatten(1).double()
    best = member @ torch.linalg.lstsq(member, x[0].double(), driver="gelsd").solution
    found = rvq.decode(codes, refit(x, None, books, 1))[0].double()
    assert float((found - best).square().sum() / best.square().sum()) < 1e-5


def test_stages_beyond_one_block_are_refitted_too(data, monkeypatch):
    x, books = data[:1, :4000], _books(data[:1, :4000], 4, 16)
    monkeypatch.setattr("gsrq.refine.BLOCK", 32)
    new = refit(x, None, books, 1)
    assert all(not torch.equal(new[:, s], books[:, s]) for s in range(4))
    codes = rvq.encode(x, books, 1)
    assert _error(x, codes, new) < _error(x, codes, books)


def test_a_refined_codec_beats_the_plain_one_on_unseen_vectors(data):
    def fitted(**options):
        x = data[:, :4000]
        c = Calibration(x=x, kind="value", layer=0, seed=0, positions=torch.arange(4000), sample_length=4000)
        return GSRQ(2, piece=16, stages=4, entries=256, **options).fit(c)

    unseen = data[None, :, 4000:]
    plain, plus = fitted(), fitted(beam=8, refine=1)
    errors = [float((unseen - codec.decode(codec.encode(unseen))).square().mean()) for codec in (plain, plus)]
    assert errors[1] < 0.97 * errors[0] and plus.bits == plain.bits
    assert not GSRQ(1, piece=16, stages=2, refine=1).adopt(dict(plus.named_buffers()))
    with pytest.raises(ValueError, match="refine"):
        GSRQ(1, refine=-1)
