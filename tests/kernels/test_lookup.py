"""Attention over residual codes: the definition against dense attention, the kernel against the definition, outputs poisoned first."""

import pytest
import torch

from kernels import lookup
from kernels.attention import attend as dense

triton_lookup = pytest.importorskip("kernels.lookup_triton", exc_type=ModuleNotFoundError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {  # batch, heads, queries per head, D, tokens, key piece and stages, value piece and stages, entries, rotary, hidden tokens
    "pieces of half a head": (2, 2, 2, 32, 150, 16, 3, 8, 2, 16, True, 0),
    "pieces over two heads, padding": (1, 2, 4, 32, 70, 64, 2, 32, 3, 256, True, 3),
    "whole heads, after RoPE": (1, 4, 1, 16, 130, 8, 1, 16, 2, 16, False, 7),
    "one token": (1, 1, 5, 16, 1, 16, 1, 16, 1, 4, True, 0),
}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: real(*shape, **options).fill_(float("nan")))


def problem(batch, heads, group, dim, tokens, key_piece, key_stages, value_piece, value_stages, entries, rotary, hidden, start=5):
    draw = torch.Generator().manual_seed(tokens)
    query = torch.randn(batch, heads * group, dim, generator=draw)
    coded = []
    for piece, stages in ((key_piece, key_stages), (value_piece, value_stages)):
        pieces = heads * dim // piece
        tables = (0.5 * torch.randn(pieces, stages, entries, piece, generator=draw)).half()
        codes = torch.randint(0, entries, (batch, tokens + 3, pieces * stages), generator=draw, dtype=torch.uint8).mT  # room to grow behind
        coded.append(lookup.Coded(codes.to(DEVICE), tables.to(DEVICE)))
    inv_freq = 10000.0 ** (-torch.arange(0, dim, 2) / dim) if rotary else None
    base = torch.full((batch,), start, dtype=torch.int32) if rotary else None
    first = torch.arange(batch) + hidden if hidden else None
    return query.to(DEVICE), *coded, tokens, 0.2, *(None if x is None else x.to(DEVICE) for x in (inv_freq, base, first))


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_definition_is_dense_attention_over_rotated_sums():
    query, keys, values, tokens, scale, inv_freq, base, first = problem(*CASES["pieces of half a head"])
    query, keys, values = query.cpu(), *(lookup.Coded(*(x.cpu() for x in c)) for c in (keys, values))
    key, value = (lookup.rebuild(c, 2, tokens) for c in (keys, values))
    for head, channel in ((0, 0), (1, 17)):  # one channel by hand: the sum over stages of the rows that the codes name
        piece, column = (head * 32 + channel) // 16, (head * 32 + channel) % 16
        codes = keys.codes[1, piece * 3 : piece * 3 + 3, 9].long()
        torch.testing.assert_close(key[1, head, 9, channel], sum(keys.tables[piece, r, codes[r], column].float() for r in range(3)))
    angle = (9 + 5) * inv_freq[3].cpu()
    turned = lookup.rotate(key, inv_freq.cpu(), base.cpu())[0, 1, 9]
    torch.testing.assert_close(turned[3], key[0, 1, 9, 3] * angle.cos() - key[0, 1, 9, 19] * angle.sin())
    ours = lookup.attend(query, keys, values, tokens, scale, inv_freq.cpu(), base.cpu())
    for a, b in zip(ours, dense(query, lookup.rotate(key, inv_freq.cpu(), base.cpu()), value, scale), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("share", [64, 512])
@pytest.mark.parametrize("case", CASES)
def test_kernel_obeys_the_definition(case, share, monkeypatch):
    monkeypatch.setattr(triton_lookup, "SHARE", share)
    query, keys, values, *rest = problem(*CASES[case])
    ours = triton_lookup.attend(query, keys, values, *rest)
    cpu = [x.cpu() if isinstance(x, torch.Tensor) else x for x in rest]
    theirs = lookup.attend(query.cpu(), *(lookup.Coded(*(x.cpu() for x in c)) for c in (keys, values)), *cpu)
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a.cpu(), b) < 2e-3


def test_far_positions_keep_their_angle():
    case = (1, 1, 2, 64, 130, 32, 2, 64, 1, 16, True, 0, 131_000)
    query, keys, values, *rest = problem(*case)
    cpu = [x.cpu() if isinstance(x, torch.Tensor) else x for x in rest]
    theirs = lookup.attend(query.cpu(), *(lookup.Coded(*(x.cpu() for x in c)) for c in (keys, values)), *cpu)
    assert relative(triton_lookup.attend(query, keys, values, *rest)[0].cpu(), theirs[0]) < 5e-3


def test_a_row_without_visible_tokens_weighs_nothing():
    query, keys, values, tokens, scale, *_ = problem(2, 1, 2, 16, 20, 16, 1, 16, 1, 4, False, 0)
    output, lse = triton_lookup.attend(query, keys, values, tokens, scale, None, None, torch.tensor([0, 20], device=DEVICE))
    assert lse[1].isneginf().all() and not output[1].any() and lse[0].isfinite().all()
