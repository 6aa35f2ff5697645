"""The beam's kernel against `kernels.rvq` on odd shapes, widths and strides, buffers poisoned first."""

import pytest
import torch

from kernels import rvq
from tests.kernels.test_rvq_triton import poison, problem  # noqa: F401

search = pytest.importorskip("kernels.rvq_beam_triton", exc_type=ModuleNotFoundError)


def error(x, codes, codebooks):
    return (x.cpu() - rvq.decode(codes.cpu().long(), codebooks.cpu())).square().sum(-1)


@pytest.mark.parametrize("beam, shape", [(2, (2, 70, 3, 33, 12)), (3, (1, 20, 4, 16, 24)), (4, (1, 23, 2, 256, 40)), (8, (1, 9, 5, 16, 8)), (8, (1, 5, 2, 4, 16))])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=["fp16", "fp8"])
def test_codes_are_those_of_float32(beam, shape, dtype):
    x, codebooks = problem(*shape)
    codebooks = codebooks.to(dtype)
    codes = search.encode(x, codebooks, beam)
    expected = rvq.encode(x.cpu(), codebooks.cpu(), beam)
    assert (codes.cpu().long() == expected).all(-1).float().mean() > 0.95  # ties within rounding fall either way
    assert error(x, codes, codebooks).sum().item() == pytest.approx(error(x, expected, codebooks).sum().item(), rel=1e-5)
    assert codes.transpose(0, 1).is_contiguous() and codes.long().max() < shape[3]


def test_strides_do_not_matter():
    x, codebooks = problem(2, 30, 2, 16, 16)
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(search.encode(apart, codebooks, 4), search.encode(x, codebooks, 4))


@pytest.mark.parametrize("beam, entries, piece, served", [(8, 256, 128, True), (9, 256, 128, False), (4, 512, 128, False), (4, 256, 256, False)])
def test_what_does_not_fit_is_left_to_torch(beam, entries, piece, served):
    assert search.serves(torch.zeros(1, 1, entries, piece, dtype=torch.float16), beam) is served
