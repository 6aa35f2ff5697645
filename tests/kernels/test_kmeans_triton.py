"""The clustering kernels against `kernels.kmeans` on odd shapes, every output poisoned first."""

import pytest
import torch

from kernels import kmeans

triton_kmeans = pytest.importorskip("kernels.kmeans_triton", exc_type=ModuleNotFoundError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 70, 33, 12), (1, 63, 64, 96), (2, 130, 16, 8), (1, 40, 20, 300), (3, 17, 7, 1), (1, 300, 5, 64)]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Whatever a kernel does not write is NaN, or an index far out of range."""
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: real(*shape, **options).fill_(float("nan") if options.get("dtype") is None else 10**6))


def problem(groups, n, count, width, dtype=torch.float32):
    draw = torch.Generator().manual_seed(n)
    x = torch.randn(groups, n, width, generator=draw).to(dtype)
    entries = torch.randn(groups, count, width, generator=draw).to(dtype).float()
    weights = torch.rand(2, groups, n, generator=draw).exp()
    return x.to(DEVICE), entries.to(DEVICE), weights.to(DEVICE)


def rounding(dtype):
    return {torch.float32: 1e-3 if DEVICE == "cuda" else 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16][: 3 if DEVICE == "cuda" else 2])  # the interpreter multiplies no bfloat16
@pytest.mark.parametrize("shape", SHAPES)
def test_nearest_and_its_score(shape, dtype):
    x, entries, _ = problem(*shape, dtype)
    scores = x.double() @ entries.double().mT - entries.double().square().sum(-1)[:, None] / 2
    labels, best = triton_kmeans.nearest(x, entries, entries.square().sum(-1) * -0.5)
    largest = scores.abs().amax()
    chosen = scores.gather(2, labels.long()[..., None])[..., 0]
    assert (scores.amax(-1) - chosen).max() <= rounding(dtype) * largest  # equal but for ties within rounding
    assert (best - chosen).abs().max() <= rounding(dtype) * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_members_equal_the_reference_and_repeat_exactly(shape, dtype):
    x, entries, weights = problem(*shape, dtype)
    labels = triton_kmeans.nearest(x, entries, entries.square().sum(-1) * -0.5)[0]
    labels[labels == 1] = 0  # an entry without members
    weight, factor = weights
    mass, (plain, second) = triton_kmeans.sums(x, weight, labels, shape[2], factor)
    expected = kmeans.sums(x.float().cpu(), weight.cpu(), labels.cpu(), shape[2], factor.cpu())
    torch.testing.assert_close(mass.cpu(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack([plain, second]).cpu(), expected[1], rtol=1e-5, atol=1e-5)
    again = triton_kmeans.sums(x, weight, labels, shape[2], factor)
    assert torch.equal(again[0], mass) and torch.equal(again[1][0], plain) and torch.equal(again[1][1], second)
    alone = triton_kmeans.sums(x, weight, labels, shape[2])  # the same additions in the same order, one weighting less
    assert torch.equal(alone[0], mass)
    torch.testing.assert_close(alone[1][0], plain)


@pytest.mark.parametrize("entries", [1, 7, 21844, 21845])  # 65,532 keys fit in sixteen bits, 65,535 do not, for want of a last bound
def test_members_are_sorted_by_entry_and_keep_their_order(entries):
    labels = torch.randint(entries, (3, 500), generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(DEVICE)
    labels[:, :2] = torch.tensor([entries - 1, 0])
    order, bounds = triton_kmeans._members(labels, entries)
    key = (labels.long() + entries * torch.arange(3, device=DEVICE)[:, None]).flatten()
    assert torch.equal(order, key.argsort(stable=True))
    assert torch.equal(bounds.long(), torch.cat([torch.zeros(1, dtype=torch.int64, device=DEVICE), key.bincount(minlength=3 * entries).cumsum(0)]))


@pytest.mark.parametrize("gather", [(16, 1, 1, 16), (8, 4, 2, 100)])
def test_populous_entries_are_split_and_joined(gather, monkeypatch):
    x, _, weights = problem(1, 300, 2, 12)
    labels = torch.zeros(1, 300, dtype=torch.int32, device=DEVICE)
    labels[:, ::7] = 1
    whole = triton_kmeans.sums(x, weights[0], labels, 2, weights[1])
    monkeypatch.setattr(triton_kmeans, "GATHER", gather)
    for a, b in zip(triton_kmeans.sums(x, weights[0], labels, 2, weights[1]), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_assessment_is_errors_their_sum_and_changes(dtype):
    x, entries, weights = problem(2, 130, 16, 8, dtype)
    entries *= 1.001  # not a number of float16
    squares, bias = x.float().square().sum(-1), entries.to(dtype).float().square().sum(-1) * -0.5
    labels, scores = triton_kmeans.nearest(x, entries, bias)
    before = labels.clone()
    before[:, ::3] += 1
    same, errors, facts = triton_kmeans.assess(x, entries, weights[0], squares, before)
    assert torch.equal(same, labels)
    torch.testing.assert_close(errors, weights[0] * (squares - 2 * scores).clamp_min(0))
    torch.testing.assert_close(facts[:, 0], errors.double().sum(1), rtol=1e-6, atol=0)
    assert facts[:, 1].tolist() == [44, 44]
    assert triton_kmeans.assess(x, entries, weights[0], squares, None)[2][:, 1].tolist() == [130, 130]


def test_clustering_through_the_kernels_reaches_the_same_objective(monkeypatch):
    x, _, weights = problem(2, 300, 8, 12)
    x, weights = x.cpu(), weights[0].cpu()
    options = {"start": "spherical", "rounds": 4}
    reference = kmeans.kmeans(x, 8, weights, generator=torch.Generator().manual_seed(0), **options)
    monkeypatch.setattr(kmeans, "nearest", lambda x, entries, cosine=False: triton_kmeans.nearest(x, entries, entries.square().sum(-1) * (0 if cosine else -0.5)))
    monkeypatch.setattr(kmeans, "_sums", triton_kmeans.sums)
    ours = kmeans.kmeans(x.to(DEVICE), 8, weights.to(DEVICE), generator=torch.Generator().manual_seed(0), **options)
    for a, b in zip(ours.objective, reference.objective, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
