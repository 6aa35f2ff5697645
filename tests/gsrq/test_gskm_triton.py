"""The gain-shape update in one launch against its definition, on entries of every kind."""

import pytest
import torch

from gsrq.gskm import gain_shape

gskm_triton = pytest.importorskip("gsrq.gskm_triton", exc_type=ModuleNotFoundError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("width", [1, 12, 32])
@pytest.mark.parametrize("share", [256, 16], ids=["whole", "in shares"])
def test_update_equals_its_definition(width, share, monkeypatch):
    monkeypatch.setattr(gskm_triton.kmeans_triton, "GATHER", (64, 2, 3, share))
    draw = torch.Generator().manual_seed(width)
    x, weights = torch.randn(2, 300, width, generator=draw), torch.rand(2, 300, generator=draw) + 0.1
    labels, entries = torch.randint(6, (2, 300), generator=draw), torch.randn(2, 6, width, generator=draw)
    labels[labels == 1] = 0  # no members: the entry stays
    x[labels == 2] = 0  # members without a direction: the old one, with gain zero
    first, second = (labels[0] == 3).nonzero()[:2, 0]
    labels[0, labels[0] == 3] = 4
    labels[0, first], labels[0, second], x[0, second] = 3, 3, -x[0, first]  # opposite members
    weights[0, first] = weights[0, second]
    weights[labels == 5] = 0  # members without weight: the entry stays
    inverse = x.norm(dim=-1)
    inverse = torch.where(inverse > 0, 1 / inverse, 0.0)
    given = (x, weights, inverse, labels, entries)
    new, mass = gskm_triton.gain_shape(*(part.to(DEVICE) for part in given))
    expected = gain_shape(*given)
    torch.testing.assert_close(new.cpu(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mass.cpu(), expected[1])
    assert torch.equal(new[:, 1].cpu(), entries[:, 1]) and torch.equal(new[:, 5].cpu(), entries[:, 5])
    assert (new[:, 2] == 0).all() and new[0, 3].abs().max() < 1e-6
