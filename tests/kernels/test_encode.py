"""Tokens to pages: the definition and its kernel write the same bits wherever lengths on the device say, and touch no others."""

from dataclasses import replace

import pytest
import torch

from kernels import backend, encode, encode_whole, synthetic
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


def goes_where_lengths_say(pair, xs, pool, monkeypatch):
    """Both paths write the same bits behind starts of random pages with room for 96 tokens more than the longest, and touch no others."""
    tokens = xs[0].shape[2]
    room = 96 + tokens // PAGE * PAGE
    starts = torch.tensor([0, 31, 40], dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([5, tokens, 0], dtype=torch.int32, device=DEVICE).clamp_max(tokens)
    results = []
    for served in (backend.use_triton, lambda x: False):
        monkeypatch.setattr(backend, "use_triton", served)
        held = [pooled(filled(spec, 3, room)) if pool else filled(spec, 3, room) for spec in pair]
        encode.Encoder(*pair).append(held, xs, starts, counts)
        results.append(held)
    for spec, x, ours, theirs in zip(pair, xs, *results):
        before, found, defined = filled(spec, 3, room).symbols(), ours.symbols(), theirs.symbols()
        coded = encode.symbols(spec, x)
        for b, (start, count) in enumerate(zip(starts.tolist(), counts.tolist())):
            new = slice(start, start + count)
            for part, old, source in zip(defined, before, coded):
                assert torch.equal(part[b, :, new], source[b, :, :count])
                assert torch.equal(part[b, :, :start], old[b, :, :start]) and torch.equal(part[b, :, start + count :], old[b, :, start + count :])
            if count:
                near([part[b, :, : start + count] for part in found], [part[b, :, : start + count] for part in defined], spec)
            # Many tokens clear the rest of the last page; one touches no other bits, and none touch none.
            end = -(-(start + count) // PAGE) * PAGE if tokens > 1 and count else start + count
            assert all(torch.equal(part[b, :, end:], old[b, :, end:]) for part, old in zip(found, before))


def drawn(tokens, dim, dtype):
    return [torch.randn(3, 2, tokens, dim, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype) for seed in (3, 4)]


@pytest.mark.parametrize("tokens", [40, 1])
@pytest.mark.parametrize("pool", [False, True], ids=["pages", "pool"])
@pytest.mark.parametrize("options,gain", [({}, "unit_norm"), ({"log8": True}, "least_squares")], ids=str)
def test_tokens_go_where_device_lengths_say(options, gain, pool, tokens, monkeypatch):
    pair = [replace(spec, gain=gain) for spec in specs(**options)]
    goes_where_lengths_say(pair, drawn(tokens, 32, torch.float32), pool, monkeypatch)


@pytest.mark.parametrize("width,options,gain,pool,dtype,tokens,dim", [
    (1, {"log8": True}, "least_squares", False, torch.float16, 40, 32),
    (2, {}, "unit_norm", True, torch.bfloat16, 40, 64),
    (3, {"centred": True}, "least_squares", True, torch.float16, 300, 32),
    (3, {}, "unit_norm", False, torch.bfloat16, 40, 16),
    (4, {"centred": True, "log8": True}, "unit_norm", False, torch.float16, 140, 128),
], ids=str)  # fmt: skip
def test_prompts_of_whole_heads_go_where_device_lengths_say(width, options, gain, pool, dtype, tokens, dim, monkeypatch):
    pair = [replace(synthetic.spec(2, dim, width, device=DEVICE, **options), gain=gain) for _ in range(2)]
    assert encode_whole.served(tuple(pair))
    goes_where_lengths_say(pair, drawn(tokens, dim, dtype), pool, monkeypatch)


@pytest.mark.parametrize("options,gain,pool,dtype,tokens,dim,bits", [
    ({}, "unit_norm", False, torch.float16, 40, 32, 3.0),
    ({"centred": True, "log8": True}, "least_squares", True, torch.bfloat16, 140, 128, 4.5),
], ids=str)  # fmt: skip
def test_prompts_of_segments_go_where_device_lengths_say(options, gain, pool, dtype, tokens, dim, bits, monkeypatch):
    draws = [synthetic.draw_widths(2, dim // 2, bits, 1.5, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    pair = [replace(synthetic.spec(2, dim, widths, device=DEVICE, **options), gain=gain) for widths in draws]
    assert encode_whole.symmetric(tuple(pair)) and not any(encode_whole.served((spec,)) for spec in pair)
    goes_where_lengths_say(pair, drawn(tokens, dim, dtype), pool, monkeypatch)


@pytest.mark.parametrize("width", [5, 6, 7, 8])
def test_prompts_of_wide_codes_go_where_device_lengths_say(width, monkeypatch):
    pair = [synthetic.spec(2, 16, width, device=DEVICE) for _ in range(2)]
    goes_where_lengths_say(pair, drawn(40, 16, torch.float16), False, monkeypatch)


def test_one_stream_of_whole_heads_beside_mixed_widths(monkeypatch):
    pair = specs()
    assert not encode_whole.served(tuple(pair)) and encode_whole.served((pair[1],))
    goes_where_lengths_say(pair, drawn(40, 32, torch.float16), False, monkeypatch)


def test_levels_that_are_not_symmetric_are_not_coded_by_magnitude(monkeypatch):
    pair = [replace(spec, levels=spec.levels + 0.25) for spec in (synthetic.spec(2, 32, 3, device=DEVICE),) * 2]
    assert not encode_whole.symmetric(tuple(pair))
    goes_where_lengths_say(pair, drawn(40, 32, torch.float16), False, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_token_of_zeros_takes_the_codes_of_the_definition(dtype, monkeypatch):
    pair = [synthetic.spec(2, 32, 3, device=DEVICE) for _ in range(2)]
    goes_where_lengths_say(pair, [torch.zeros_like(x) for x in drawn(40, 32, dtype)], False, monkeypatch)


def test_zeros_have_gain_zero():
    codes, gains = encode.symbols(synthetic.spec(1, 32, 2, device=DEVICE), torch.zeros(1, 1, 3, 32, device=DEVICE))
    assert codes.shape == (1, 1, 3, 32) and gains.shape == (1, 1, 3) and not gains.any()


def test_tokens_of_another_type_leave_the_tables_of_the_first():
    pair = [specs()[0]] * 2
    encoder, starts = encode.Encoder(*pair), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    x = torch.randn(1, 2, 3, 32, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    found, made = [], []
    for dtype in (torch.float16, torch.float32, torch.float16):
        held = [filled(spec, 1, 32) for spec in pair]
        encoder.append(held, [x.to(dtype)] * 2, starts, starts + 3)
        found.append([part for pages in held for part in pages.symbols()])
        made.append((encoder._tables | encoder._launches)[x.device, dtype])
    assert made[2] is made[0] and made[1] is not made[0]  # a captured graph goes on reading them
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2]))
