"""Splits merged and turned back against the sums in torch: few and many splits, some without mass, every output poisoned first."""

import math

import pytest
import torch

from kernels import backend

pytestmark = pytest.mark.skipif(not backend._installed(), reason="Triton is not installed here")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


def definition(out, stat, group, back, mean):
    """(output, lse) in float64; out [B, H, S, G, D]."""
    tops, masses, out = stat[:, :, :, 0, :group].double(), stat[:, :, :, 1, :group].double(), out[..., :group, :].double()
    peak = tops.amax(2, keepdim=True)
    weight = torch.where(masses > 0, 2 ** (tops - torch.where(peak.isinf(), 0, peak)), 0)
    total = (torch.where(weight[..., None] > 0, out, 0) * weight[..., None]).sum(2)
    mass = (weight * masses).sum(2)
    turned = (total / torch.where(mass == 0, 1, mass)[..., None]) @ back.double().mT + mean.double()[:, None]
    lse = torch.where(mass == 0, -math.inf, math.log(2) * (peak[:, :, 0] + mass.log2()))
    return turned.flatten(1, 2).float(), lse.flatten(1, 2).float()


@pytest.mark.parametrize("splits,dim,group,shared", [(1, 128, 4, False), (5, 96, 1, True), (64, 64, 3, False), (65, 80, 2, False), (150, 128, 2, True), (300, 32, 1, False)])
def test_a_split_without_mass_counts_for_nothing(splits, dim, group, shared, monkeypatch):
    from kernels.merge_triton import merge

    generator = torch.Generator().manual_seed(splits)
    batch, heads, wide = 2, 2, 8
    out = torch.randn(batch, heads, splits, wide, dim, generator=generator)
    stat = torch.stack([40 * torch.randn(batch, heads, splits, wide, generator=generator), 0.1 + torch.rand(batch, heads, splits, wide, generator=generator)], 3)
    empty = torch.rand(batch, heads, splits, 1, generator=generator).expand(-1, -1, -1, wide) < 0.3
    empty[0, 1] = True  # a head of a sequence without visible tokens
    empty[1, 0, 0] = False
    stat[:, :, :, 0][empty], stat[:, :, :, 1][empty], out[empty] = -math.inf, 0, NAN
    stat[..., group:], out[..., group:, :] = NAN, NAN
    back = torch.randn(1 if shared else heads, dim, dim, generator=generator)
    mean = torch.randn(heads, dim, generator=generator)
    args = [x.to(DEVICE) for x in (out, stat, back, mean)]
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: made.fill_(NAN) if (made := real(*shape, **options)).is_floating_point() else made)
    output, lse = merge(args[0], args[1], group, args[2], args[3])
    theirs = definition(args[0], args[1], group, args[2], args[3])
    torch.testing.assert_close(output, theirs[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, theirs[1], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(output[0, group : 2 * group], mean.to(DEVICE)[1].expand(group, -1))
