"""Tokens to pages: the definition and its kernel write the same bits wherever lengths on the device say, and touch no others."""

from dataclasses import replace

import pytest
import torch

from kernels import backend, encode, synthetic
from kernels.pages import PAGE, Pool, room

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not backend._installed(), reason="Triton is not installed here")


def specs(**options):
    generator = torch.Generator().manual_seed(0)
    mixed = synthetic.draw_widths(2, 16, 3.0, 1.0, generator)
    return [synthetic.spec(2, 32, widths, centred=True, device=DEVICE, **options) for widths in (mixed, 3)]


def filled(spec, batch, tokens):
    """Pages full of random bits, so that a bit that must stay is seen if it does not."""
    return synthetic.pages(spec, batch, tokens, torch.Generator().manual_seed(1))


def pooled(held):
    """The same pages in one store, in another order, behind a table."""
    batch, heads, count, _ = held.words.shape
    table = torch.randperm(batch * count, generator=torch.Generator().manual_seed(2)).view(batch, count).to(DEVICE)
    words = room(batch * count, heads, held.layout.words, device=torch.device(DEVICE))
    sides = held.sides.new_zeros(batch * count, *held.sides.shape[2:])
    words[table], sides[table] = held.words.transpose(1, 2), held.sides
    return Pool(held.spec, held.layout, words, sides, table.int(), held.tokens)


def near(ours, theirs, spec):
    """Equal up to one code per thousand beside a threshold; a gain's last bits."""
    (codes, sides), (expected, gains) = ours, theirs
    assert (codes != expected).float().mean() <= 1e-3 and (codes - expected).abs().max() <= 1
    torch.testing.assert_close(sides.float(), gains.float(), rtol=2e-3, atol=1.0 if spec.log8 else 1e-3)


@pytest.mark.parametrize("tokens", [40, 1])
@pytest.mark.parametrize("pool", [False, True], ids=["pages", "pool"])
@pytest.mark.parametrize("options,gain", [({}, "unit_norm"), ({"log8": True}, "least_squares")], ids=str)
def test_tokens_go_where_device_lengths_say(options, gain, pool, tokens, monkeypatch):
    key, value = (replace(spec, gain=gain) for spec in specs(**options))
    starts = torch.tensor([0, 31, 40], dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([5, 40, 0], dtype=torch.int32, device=DEVICE).clamp_max(tokens)
    xs = [torch.randn(3, 2, tokens, 32, generator=torch.Generator().manual_seed(seed)).to(DEVICE) for seed in (3, 4)]
    results = []
    for served in (backend.use_triton, lambda x: False):
        monkeypatch.setattr(backend, "use_triton", served)
        held = [pooled(filled(spec, 3, 96)) if pool else filled(spec, 3, 96) for spec in (key, value)]
        encode.Encoder(key, value).append(held, xs, starts, counts)
        results.append(held)
    for spec, x, ours, theirs in zip((key, value), xs, *results):
        before, found, defined = filled(spec, 3, 96).symbols(), ours.symbols(), theirs.symbols()
        coded = encode.symbols(spec, x)
        for b, (start, count) in enumerate(zip(starts.tolist(), counts.tolist())):
            new = slice(start, start + count)
            for part, old, source in zip(defined, before, coded):
                assert torch.equal(part[b, :, new], source[b, :, :count])
                assert torch.equal(part[b, :, :start], old[b, :, :start]) and torch.equal(part[b, :, start + count :], old[b, :, start + count :])
            if count:
                near([part[b, :, : start + count] for part in found], [part[b, :, : start + count] for part in defined], spec)
            # Many tokens clear the rest of the last page; one touches no other bits, and none touch none.
            end = -(-(start + count) // PAGE) * PAGE if count > 1 else start + count
            assert all(torch.equal(part[b, :, end:], old[b, :, end:]) for part, old in zip(found, before))


def test_zeros_have_gain_zero():
    codes, gains = encode.symbols(synthetic.spec(1, 32, 2, device=DEVICE), torch.zeros(1, 1, 3, 32, device=DEVICE))
    assert codes.shape == (1, 1, 3, 32) and gains.shape == (1, 1, 3) and not gains.any()


def test_tokens_of_another_type_leave_the_tables_of_the_first():
    pair = specs()
    encoder, starts = encode.Encoder(*pair), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    x = torch.randn(1, 2, 3, 32, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    found, made = [], []
    for dtype in (torch.float16, torch.float32, torch.float16):
        held = [filled(spec, 1, 32) for spec in pair]
        encoder.append(held, [x.to(dtype)] * 2, starts, starts + 3)
        found.append([part for pages in held for part in pages.symbols()])
        made.append(encoder._tables[x.device, dtype])
    assert made[2] is made[0] and made[1] is not made[0]  # a captured graph goes on reading them
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2]))
