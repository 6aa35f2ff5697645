"""Attention over residual codes: the definition against dense attention, the kernel against the definition, outputs poisoned first."""

import pytest
import torch

from kernels import lookup
from kernels.attention import attend as dense

direct = pytest.importorskip("kernels.lookup_direct_triton", exc_type=ModuleNotFoundError)
from kernels import lookup_bound_triton as bound  # noqa: E402  (needs triton too)
from kernels import lookup_rows_triton as rows  # noqa: E402
from kernels import lookup_shares_triton as shares  # noqa: E402
from kernels.lookup_rows_triton import layout, merge  # noqa: E402

KERNELS = {"bound": bound, "direct": direct}

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {  # batch, heads, queries per head, D, tokens, key piece and stages, value piece and stages, entries, then options of `problem`
    "pieces of half a head": (2, 2, 2, 32, 150, 16, 3, 8, 2, 16, {}),
    "pieces over two heads, padding": (1, 2, 4, 32, 70, 64, 2, 32, 3, 256, {"hidden": 3}),
    "whole heads, after RoPE": (1, 4, 1, 32, 130, 8, 1, 32, 2, 16, {"rotary": False, "hidden": 7}),
    "after RoPE, pieces over two heads, three queries a head": (2, 4, 3, 32, 70, 64, 4, 32, 2, 16, {"rotary": False, "dtype": torch.float8_e4m3fn}),
    "after RoPE, one strided table, codes by heads": (1, 2, 2, 32, 40, 16, 2, 16, 2, 16, {"rotary": False, "strips": True, "shared": True, "sized": True, "strided": True}),
    "one token": (1, 1, 5, 32, 1, 16, 1, 16, 1, 4, {}),
    "one token, head and query: counts of one are constants to the compiler": (1, 1, 1, 32, 1, 16, 2, 16, 2, 16, {}),
    "a sliding window: whole tiles hidden, each row its own": (3, 1, 2, 32, 200, 16, 2, 32, 2, 16, {"hidden": 70, "apart": 60}),
    "eight bits, narrow pieces": (1, 2, 2, 64, 90, 8, 4, 8, 4, 32, {"dtype": torch.float8_e4m3fn}),
    "eight bits, all codes of a head in four words": (1, 3, 4, 32, 150, 8, 4, 32, 4, 256, {"dtype": torch.float8_e4m3fn, "hidden": 5}),
    "eight bits, codes astride words": (1, 2, 2, 32, 140, 8, 3, 16, 3, 256, {"dtype": torch.float8_e4m3fn}),
    "eight queries a head, two stages": (1, 1, 12, 32, 40, 8, 2, 16, 2, 256, {}),
    "one shared table, codes by heads, sizes, strided keys": (2, 2, 2, 32, 100, 16, 2, 8, 3, 16, {"strips": True, "shared": True, "sized": True, "strided": True}),
    "a table per piece, codes by heads, strided keys over sixteen tokens": (1, 2, 1, 64, 16, 16, 1, 16, 2, 16, {"strips": True, "strided": True}),
}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: real(*shape, **options).fill_(float("nan")))


def problem(
    batch, heads, group, dim, tokens, key_piece, key_stages, value_piece, value_stages, entries,
    rotary=True, hidden=0, apart=1, start=5, dtype=torch.float16, strips=False, shared=False, sized=False, strided=False,
):  # fmt: skip
    draw = torch.Generator().manual_seed(tokens)
    query = torch.randn(batch, heads * group, dim, generator=draw)
    coded = []
    for piece, stages in ((key_piece, key_stages), (value_piece, value_stages)):
        pieces, strip = heads * dim // piece, heads if strips else 1
        tables = (0.5 * torch.randn(1 if shared else pieces, stages, entries, piece, generator=draw)).to(dtype)
        codes = torch.randint(0, entries, (batch, strip, tokens + 3, pieces * stages // strip), generator=draw, dtype=torch.uint8).mT  # room to grow behind
        sizes = (torch.rand(batch, heads, tokens + 3, generator=draw) + 0.5).half().to(DEVICE) if sized else None
        coded.append(lookup.Coded(codes.to(DEVICE), tables.to(DEVICE).expand(pieces, -1, -1, -1), sizes, strided and not coded))
    inv_freq = 10000.0 ** (-torch.arange(0, dim, 2) / dim) if rotary else None
    base = start + 3 * torch.arange(batch, dtype=torch.int32) if rotary else None
    first = hidden + apart * torch.arange(batch) if hidden else None
    return query.to(DEVICE), *coded, tokens, 0.2, *(None if x is None else x.to(DEVICE) for x in (inv_freq, base, first))


def defined(query, keys, values, *rest):
    rest = [x.cpu() if isinstance(x, torch.Tensor) else x for x in rest]
    coded = (lookup.Coded(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in c)) for c in (keys, values))
    return lookup.attend(query.cpu(), *coded, *rest)


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_definition_is_dense_attention_over_rotated_sums():
    query, keys, values, tokens, scale, inv_freq, base, first = problem(*CASES["pieces of half a head"][:-1])
    query, keys, values = query.cpu(), *(lookup.Coded(c.codes.cpu(), c.tables.cpu()) for c in (keys, values))
    key, value = (lookup.rebuild(c, 2, tokens) for c in (keys, values))
    for head, channel in ((0, 0), (1, 17)):  # one channel by hand: the sum over stages of the rows that the codes name
        piece, column = (head * 32 + channel) // 16, (head * 32 + channel) % 16
        codes = keys.codes[1, 0, piece * 3 : piece * 3 + 3, 9].long()
        torch.testing.assert_close(key[1, head, 9, channel], sum(keys.tables[piece, r, codes[r], column].float() for r in range(3)))
    angle = (9 + int(base[0])) * inv_freq[3].cpu()
    turned = lookup.rotate(key, inv_freq.cpu(), base.cpu())[0, 1, 9]
    torch.testing.assert_close(turned[3], key[0, 1, 9, 3] * angle.cos() - key[0, 1, 9, 19] * angle.sin())
    ours = lookup.attend(query, keys, values, tokens, scale, inv_freq.cpu(), base.cpu())
    for a, b in zip(ours, dense(query, lookup.rotate(key, inv_freq.cpu(), base.cpu()), value, scale), strict=True):
        torch.testing.assert_close(a, b)


def test_definition_of_strided_pieces_and_sizes():
    _, keys, *_ = problem(*CASES["one shared table, codes by heads, sizes, strided keys"][:-1], strips=True, shared=True, sized=True, strided=True)
    codes, tables, sizes = keys.codes.cpu(), keys.tables.cpu().float(), keys.sizes.cpu().float()
    head, channel, token = 1, 13, 9  # two pieces of 16: channel 13 is column 6 of piece 1
    named = codes[1, head, 2:4, token].long()
    value = sum(tables[0, r, named[r], 6] for r in range(2)) * sizes[1, head, token]
    torch.testing.assert_close(lookup.rebuild(lookup.Coded(codes, keys.tables.cpu(), keys.sizes.cpu(), True), 2, 20)[1, head, token, channel], value)


@pytest.fixture(
    params=[
        "bound, tables fit",
        "bound, by pieces and stages",
        "bound, more tables than processors",
        "direct, tables fit",
        "direct, by pieces and stages",
    ]
)
def kernel(request, monkeypatch):
    name, _, how = request.param.partition(", ")
    monkeypatch.setattr(shares, "MULTIPROCESSORS", 3 if how == "more tables than processors" else 7)
    monkeypatch.setattr(shares, "CACHE", 2**30 if how == "tables fit" else 1024)
    return KERNELS[name]


@pytest.mark.parametrize("case", CASES)
def test_kernels_obey_the_definition(case, kernel):
    *shape, options = CASES[case]
    query, *given = problem(*shape, **options)
    expected = defined(query, *given)
    for a, b in zip(kernel.attend(query.half(), *given), expected, strict=True):
        assert relative(a.cpu(), b) < 2e-3


@pytest.mark.parametrize("piece, stages, words", [(32, 4, 16), (32, 3, 16), (128, 16, 4), (64, 6, 8), (128, 6, 0), (8, 1, 0)])
def test_a_token_asks_for_its_codes_once(piece, stages, words, monkeypatch):
    tables = torch.zeros(8 * 128 // piece, stages, 256, piece).to(torch.float8_e4m3fn)
    keys = lookup.Coded(torch.zeros(1, 1, 300, 8 * 128 // piece * stages, dtype=torch.uint8).mT, tables)
    found = {}
    for name in ("_values", "_turned", "_scores", "merge_shares"):  # launches that note their options
        launch = type("Launch", (), {"__getitem__": lambda self, grid, name=name: lambda *_, **options: found.update({name: options})})()
        monkeypatch.setattr(direct if hasattr(direct, name) else rows, name, launch)
    direct.attend(torch.zeros(1, 32, 128).half(), keys, keys, 300, 1.0, torch.ones(64), torch.zeros(1, dtype=torch.int32))
    assert found["_scores"]["WORDS"] == words


def test_shares_are_merged_by_their_mass():
    parts, sums = torch.randn(2, 70, 6, 64), 3 * torch.randn(70, 6)
    sums[5], sums[:, 4] = float("-inf"), float("-inf")
    out, lse = merge(parts.to(DEVICE), sums.to(DEVICE), torch.empty(2, 3, 64, device=DEVICE))
    weights = sums[:, :, None].softmax(0).nan_to_num()
    torch.testing.assert_close(out.cpu().view(6, 64), (weights * parts.sum(0)).sum(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.cpu().view(6), sums.logsumexp(0))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_float32_queries_keep_their_digits(case, name, monkeypatch):
    monkeypatch.setattr(shares, "MULTIPROCESSORS", 7)
    monkeypatch.setattr(shares, "CACHE", 1024)
    *shape, options = CASES[case]
    given = problem(*shape, **options)
    for a, b in zip(KERNELS[name].attend(*given), defined(*given), strict=True):
        assert relative(a.cpu(), b) < 1e-5


@pytest.mark.parametrize("name", KERNELS)
def test_far_positions_keep_their_angle(name, monkeypatch):
    monkeypatch.setattr(shares, "MULTIPROCESSORS", 3)
    given = problem(1, 1, 2, 64, 130, 32, 2, 64, 1, 16, start=131_000)
    assert relative(KERNELS[name].attend(*given)[0].cpu(), defined(*given)[0]) < 5e-3


@pytest.mark.parametrize("name", KERNELS)
def test_a_row_without_visible_tokens_weighs_nothing(name, monkeypatch):
    monkeypatch.setattr(shares, "MULTIPROCESSORS", 3)
    query, keys, values, tokens, scale, *_ = problem(2, 1, 2, 32, 20, 16, 1, 32, 1, 4, rotary=False)
    output, lse = KERNELS[name].attend(query, keys, values, tokens, scale, None, None, torch.tensor([0, 20], device=DEVICE))
    assert lse[1].isneginf().all() and not output[1].any() and lse[0].isfinite().all()


@pytest.mark.parametrize(
    "piece, stages, dtype, share",
    [
        (128, 16, torch.float16, (1, 2, 8)), (128, 16, torch.float8_e4m3fn, (1, 4, 4)), (128, 12, torch.float8_e4m3fn, (1, 4, 3)),
        (128, 6, torch.float16, (1, 2, 3)), (64, 8, torch.float16, (1, 2, 4)), (32, 4, torch.float16, (2, 4, 1)),
        (32, 4, torch.float8_e4m3fn, (1, 4, 1)), (32, 3, torch.float8_e4m3fn, (1, 3, 1)), (8, 1, torch.float16, (1, 1, 1)),
    ],
)  # fmt: skip
def test_shares_of_the_tables_fit_the_cache(piece, stages, dtype, share):
    keys = lookup.Coded(torch.zeros(1, 1, 8 * 128 // piece * stages, 1, dtype=torch.uint8), torch.zeros(8 * 128 // piece, stages, 256, piece).to(dtype))
    rows = layout(keys, 128, True)
    found = shares.divide(rows, 128, dtype.itemsize)
    assert tuple(found) == share
    assert found.depth * 256 * 128 // found.slices * dtype.itemsize <= shares.CACHE
