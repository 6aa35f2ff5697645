"""A coarser budget cut from a finer fit is the fit of the coarser budget."""

from types import SimpleNamespace

import pytest
import torch

from gsrq import GSRQ
from gsrq.gskm import gskm
from kernels.kmeans import kmeans


@pytest.mark.parametrize("cluster", [gskm, kmeans], ids=["gskm", "kmeans"])
def test_prefix_of_the_stages_is_the_coarser_fit(cluster):
    x = torch.randn(2, 400, 64, generator=torch.Generator().manual_seed(0))
    calibration = SimpleNamespace(x=x, kind="key", layer=1, seed=0, grads=None, pairs=None, inv_freq=None)

    def make(bits):
        return GSRQ(bits, entries=16, piece=64, cluster=lambda *a, **k: cluster(*a, rounds=4, **k))

    finer, coarser, cut = make(0.5).fit(calibration), make(0.25).fit(calibration), make(0.25)
    assert cut.adopt(dict(finer.named_buffers()))
    assert torch.equal(cut.codebooks, coarser.codebooks) and torch.equal(cut.scale, coarser.scale)
    assert torch.equal(cut.encode(x[None])["codes"], coarser.encode(x[None])["codes"])
    assert not make(0.5).adopt(dict(coarser.named_buffers()))
    assert not GSRQ(0.5, entries=16, piece=128).adopt(dict(finer.named_buffers()))
