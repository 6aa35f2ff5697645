"""Residual codes decode to the sum that the encoder saw, and a wider beam codes better."""

import pytest
import torch

from kernels import rvq


def problem(groups=2, n=77, stages=5, entries=16, width=24):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(groups, n, width, generator=draw)
    shrink = 0.8 ** torch.arange(stages).view(-1, 1, 1)
    return x, 0.4 * shrink * torch.randn(groups, stages, entries, width, generator=draw)


def error(x, codes, codebooks):
    return (x - rvq.decode(codes, codebooks)).square().sum(-1)


def test_greedy_is_the_nearest_entry_stage_by_stage():
    x, codebooks = problem()
    codes = rvq.encode(x, codebooks)
    rest = x.clone()
    for stage in range(codebooks.shape[1]):
        best = torch.cdist(rest, codebooks[:, stage]).argmin(-1)
        assert torch.equal(codes[..., stage], best)
        rest -= torch.stack([codebooks[g, stage, best[g]] for g in range(2)])
    torch.testing.assert_close(x - rvq.decode(codes, codebooks), rest)


def test_prefix_of_the_stages_is_a_coarser_code():
    x, codebooks = problem()
    codes = rvq.encode(x, codebooks)
    assert torch.equal(codes[..., :2], rvq.encode(x, codebooks[:, :2]))
    torch.testing.assert_close(rvq.decode(codes[..., :2], codebooks), rvq.decode(codes[..., :2], codebooks[:, :2]))


@pytest.mark.parametrize("beam", [2, 4, 8])
def test_beam_beats_greedy(beam):
    x, codebooks = problem()
    greedy, wide = error(x, rvq.encode(x, codebooks), codebooks), error(x, rvq.encode(x, codebooks, beam), codebooks)
    assert wide.mean() < greedy.mean()
    assert (wide <= greedy + 1e-4).float().mean() > 0.95  # single vectors may lose: the beam can drop the greedy path


def test_full_beam_is_exhaustive():
    x, codebooks = problem(groups=1, n=20, stages=2, entries=4)
    sums = (codebooks[0, 0, :, None] + codebooks[0, 1, None]).flatten(0, 1)
    best = torch.cdist(x[0], sums).square().amin(-1)
    torch.testing.assert_close(error(x, rvq.encode(x, codebooks, 4), codebooks)[0], best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beam", [1, 4])
def test_chunks_do_not_change_the_codes(beam, monkeypatch):
    x, codebooks = problem()
    whole = rvq.encode(x, codebooks, beam)
    monkeypatch.setattr("kernels.rvq.SCORES", 2 * 16 * 24)
    assert torch.equal(whole, rvq.encode(x, codebooks, beam))


def test_norms_are_made_once_and_go_with_their_tables():
    tables = torch.randn(2, 3, 16, 8).half()
    first = rvq.bias_of(tables)
    assert rvq.bias_of(tables) is first and torch.equal(first, tables.float().square().sum(-1) * -0.5)
    twin = tables.clone()
    assert rvq.bias_of(twin) is not first
    before = len(rvq._biases)
    del twin
    assert len(rvq._biases) == before - 1
