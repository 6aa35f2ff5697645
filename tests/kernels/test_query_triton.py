"""Queries turned into stored positions against a matrix product: ragged dimensions, any group, every output poisoned first."""

import pytest
import torch

from kernels import backend

pytestmark = pytest.mark.skipif(not backend._installed(), reason="Triton is not installed here")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dim,group,dtype", [(128, 4, torch.float16), (96, 3, torch.bfloat16), (64, 1, torch.float32), (16, 20, torch.float32), (80, 8, torch.float16)])
def test_queries_sums_and_nothing_behind_them(dim, group, dtype, monkeypatch):
    from kernels.query_triton import rotate

    generator = torch.Generator().manual_seed(dim)
    batch, heads, rows, scale = 2, 3, dim + 16, 0.3
    query = torch.randn(batch, heads * group, dim, generator=generator).to(DEVICE, dtype)
    matrix, sums = (torch.randn(heads, n, dim, generator=generator).to(DEVICE) for n in (rows, 2))
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: made.fill_(float("nan")) if (made := real(*shape, **options)).is_floating_point() else made)
    turned, aux = rotate(query, matrix, sums, scale)
    wide = max(8, 1 << (group - 1).bit_length())
    assert turned.shape == (batch, heads, rows, wide) and aux.shape == (batch, heads, 2, wide) and aux.dtype == torch.float32
    assert turned.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
    stacked = scale * query.float().view(batch, heads, group, dim)
    limit = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(turned[..., :group].float(), matrix @ stacked.mT, atol=limit, rtol=limit)
    torch.testing.assert_close(aux[..., :group], sums @ stacked.mT, atol=1e-4, rtol=1e-4)
    assert not turned[..., group:].any() and not aux[..., group:].any()
