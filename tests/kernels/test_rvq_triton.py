"""The residual encoder's kernel against `kernels.rvq` on odd shapes and strides, codes poisoned first."""

import pytest
import torch

from kernels import rvq

triton_rvq = pytest.importorskip("kernels.rvq_triton", exc_type=ModuleNotFoundError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: real(*shape, **options).fill_(255))


def problem(groups, n, stages, entries, width):
    draw = torch.Generator().manual_seed(n)
    return torch.randn(groups, n, width, generator=draw).to(DEVICE), (0.4 * torch.randn(groups, stages, entries, width, generator=draw)).half().to(DEVICE)


@pytest.mark.parametrize("shape", [(2, 70, 3, 33, 12), (1, 63, 2, 256, 96), (3, 5, 4, 16, 8), (1, 20, 2, 300, 32), (1, 1, 2, 16, 200)])
def test_codes_are_those_of_float32(shape):
    x, codebooks = problem(*shape)
    codes = triton_rvq.encode(x, codebooks)
    expected = rvq.encode(x.cpu(), codebooks.cpu())
    assert (codes.cpu().long() == expected).all(-1).float().mean() > 0.97  # ties within rounding fall either way
    error = [(x.cpu() - rvq.decode(c.cpu().long(), codebooks.cpu())).square().sum().item() for c in (codes, expected)]
    assert error[0] == pytest.approx(error[1], rel=1e-5)
    assert codes.long().max() < shape[3]
    assert codes.transpose(0, 1).is_contiguous()  # a token's codes lie side by side, ready to be packed


def test_strides_and_half_precision_inputs():
    x, codebooks = problem(4, 30, 2, 16, 16)
    tokens = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(triton_rvq.encode(tokens, codebooks), triton_rvq.encode(x, codebooks))
    assert torch.equal(triton_rvq.encode(tokens.half(), codebooks), triton_rvq.encode(x.half().float(), codebooks))


def test_the_low_half_matters_only_at_near_ties():
    x, codebooks = problem(2, 100, 4, 64, 24)
    whole, high = (triton_rvq.encode(x, codebooks, split) for split in (True, False))
    assert (whole == high).float().mean() > 0.95
    error = [(x - rvq.decode(codes.long(), codebooks)).square().mean().item() for codes in (whole, high)]
    assert error[1] == pytest.approx(error[0], rel=1e-2)
