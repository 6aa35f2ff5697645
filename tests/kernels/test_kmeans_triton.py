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
    ours = triton_kmeans.sums(x, weights, labels, shape[2])
    theirs = kmeans.sums(x.float().cpu(), weights.cpu(), labels.cpu(), shape[2])
    for a, b, again in zip(ours, theirs, triton_kmeans.sums(x, weights, labels, shape[2]), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)
        assert torch.equal(a, again)


@pytest.mark.parametrize("eager", [False, True])
def test_populous_entries_are_split_and_joined(eager, monkeypatch):
    x, _, weights = problem(1, 300, 2, 12)
    labels = torch.zeros(1, 300, dtype=torch.int32, device=DEVICE)
    labels[:, ::7] = 1
    whole = triton_kmeans.sums(x, weights, labels, 2)
    monkeypatch.setattr(triton_kmeans, "GATHER", {2: (16, 1, 1, eager, 16)})
    for a, b in zip(triton_kmeans.sums(x, weights, labels, 2), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_assessment_is_errors_their_sum_and_changes():
    x, entries, weights = problem(2, 130, 16, 8)
    squares, bias = x.square().sum(-1), entries.square().sum(-1) * -0.5
    labels, scores = triton_kmeans.nearest(x, entries, bias)
    before = labels.clone()
    before[:, ::3] += 1
    same, errors, facts = triton_kmeans.assess(x, entries, bias, weights[0], squares, before)
    assert torch.equal(same, labels)
    torch.testing.assert_close(errors, weights[0] * (squares - 2 * scores).clamp_min(0))
    torch.testing.assert_close(facts[:, 0], errors.double().sum(1))
    assert facts[:, 1].tolist() == [44, 44]
    assert triton_kmeans.assess(x, entries, bias, weights[0], squares, None)[2][:, 1].tolist() == [130, 130]


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
