"""The cache adapter on tiny models: exact where nothing may be lost, each token encoded once, padding and chunks without effect."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from kvq.baselines.fp16 import FP16
from kvq.errors import Refusal
from tests.kvq.codecs import FAR, NEAR, Exact, Spy, bind, distance, forced, generate, library, lossy, pad_left, pairs, tokens

LAYOUTS = [
    {}, {"block": 4}, {"stateful": True}, {"space": "pre"}, {"space": "pre", "block": 4}, {"space": "pre", "stateful": True, "block": 2}
]  # fmt: skip
HELD = [{}, {"sink": 2}, {"window": 7}, {"sink": 3, "window": 5}]


@pytest.mark.parametrize("architecture", ["llama", "qwen25", "glm4", "gemma3", "llama_yarn"])
@pytest.mark.parametrize("chunk", [None, 8])
def test_a_window_over_everything_is_the_library_bit_for_bit(architecture, chunk):
    lm = bind(architecture, window=64)
    ids, mask = pad_left(tokens(3, 20), [0, 4, 6])
    ours, theirs = (generate(lm, ids, mask, cache=cache, prefill_chunk_size=chunk) for cache in (None, DynamicCache(config=lm.model.config)))
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.logits, theirs.logits)
    assert ours.cache.audit()["encoded"] == 0


@pytest.mark.parametrize("held", [{}, {"sink": 2, "window": 4}], ids=str)
@pytest.mark.parametrize("memo", [True, False])
def test_sixteen_bits_lose_nothing_of_a_bfloat16_model(held, memo):
    def fp16(model):
        return pairs(model, lambda: FP16(16).fit(_shape(model)))

    ids, mask = pad_left(tokens(2, 20), [0, 5])
    lm = bind("llama", fp16, dtype="bfloat16", memo=memo, **held)
    ours, theirs = generate(lm, ids, mask), library(lm, ids, mask)
    assert torch.equal(ours.logits, theirs.logits) and ours.cache.audit()["encoded"] > 0
    lm = bind("llama", fp16, memo=memo, **held)
    assert distance(generate(lm, ids, mask).logits, library(lm, ids, mask).logits) < FAR


def _shape(model):
    config = model.config
    return SimpleNamespace(x=torch.zeros(config.num_key_value_heads, 4, config.head_dim), kind="key", layer=0, seed=0)


@pytest.mark.parametrize("architecture", ["llama", "llama31", "llama_yarn", "qwen3", "glm4", "gemma3"])
def test_keys_before_rope_come_back_as_they_were(architecture):
    lm = bind(architecture, lambda model: pairs(model, lambda: Exact("pre"), Exact))
    ids, mask = pad_left(tokens(2, 20), [0, 5])
    ours, theirs = generate(lm, ids, mask, steps=20), library(lm, ids, mask, steps=20)
    torch.testing.assert_close(ours.logits, theirs.logits, **NEAR)


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("held", HELD, ids=str)
def test_each_token_is_encoded_once_prefill_included(options, held):
    spies = []

    def make(model):
        for _ in range(model.config.num_hidden_layers):
            spies.append((Spy(**options), Spy(**{**options, "space": "post"})))
        return spies

    lm = bind("llama", make, **held)
    ids = tokens(2, 21)
    out = generate(lm, ids, steps=13)
    length = 21 + 12  # the last token is never fed back
    expected = (length - held.get("sink", 0) - held.get("window", 0)) // options.get("block", 1) * options.get("block", 1)
    for spy in [spy for pair in spies for spy in pair]:
        assert sum(x.shape[2] for x in spy.seen) == expected
    report = out.cache.audit()
    assert out.cache.get_seq_length() == length and report["tokens"] == 2 * length and report["encoded"] == 2 * expected
    assert report["exact_bytes"] >= 2 * 2 * 2 * (length - expected) * 2 * 16 * 4
    for layer in out.cache.quantized_layers:
        assert all(stream.encoded + stream.exact == length for stream in layer.streams)


def test_a_single_forward_sees_the_loss():
    lm = bind()
    ids = tokens(2, 12)
    with torch.inference_mode():
        plain = lm.model(ids).logits
    coded = lm.logits(ids)
    assert distance(coded, plain) > FAR and distance(coded[:, :1], plain[:, :1]) > FAR


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("held", HELD, ids=str)
def test_memo_changes_nothing(options, held):
    ids, mask = pad_left(tokens(2, 18), [0, 5])
    kept, fresh = (generate(lossy(options, held, memo=memo), ids, mask) for memo in (True, False))
    torch.testing.assert_close(kept.logits, fresh.logits, **NEAR)


@pytest.mark.parametrize("space", ["pre", "post"])
def test_one_pass_equals_token_by_token_without_window(space):
    lm = lossy({"space": space}, {})
    ids = tokens(4, 24)
    whole = lm.logits(ids)
    for chunks in ([1] * 24, [10, 10, 4], [23, 1]):
        torch.testing.assert_close(forced(lm, ids, chunks), whole, **NEAR)
    for row in range(4):
        torch.testing.assert_close(lm.logits(ids[row : row + 1]), whole[row : row + 1], **NEAR)


def test_with_a_window_one_pass_is_streaming_with_the_window_full_precision_at_the_end_only():
    lm = lossy({}, {"window": 8})
    ids = tokens(1, 24)
    whole, streamed = lm.logits(ids), forced(lm, ids, [1] * 24)
    assert distance(whole, streamed) > FAR, "the documented difference is gone: say so in the notes on prefill protocols"
    torch.testing.assert_close(streamed[:, :8], lm.model(ids).logits[:, :8], **NEAR)


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("held", HELD, ids=str)
@pytest.mark.parametrize("prefill", ["quantized", "exact"])
def test_a_left_padded_row_equals_the_row_alone(options, held, prefill):
    lm = lossy(options, held, prefill=prefill)
    ids, pads = tokens(3, 22), [0, 3, 9]
    padded, mask = pad_left(ids, pads)
    together = generate(lm, padded, mask)
    exact = library(lm, padded, mask)
    for row, pad in enumerate(pads):
        alone = generate(lm, ids[row : row + 1, pad:])
        torch.testing.assert_close(together.logits[row : row + 1], alone.logits, **NEAR)
        assert torch.equal(together.tokens[row : row + 1], alone.tokens)
    assert distance(together.logits[:, 1:], exact.logits[:, 1:]) > FAR


@pytest.mark.parametrize("options", [{"space": "pre"}, {"space": "pre", "stateful": True, "block": 2}], ids=str)
@pytest.mark.parametrize("architecture", ["llama_yarn", "glm4", "gemma3", "qwen3_moe"])
def test_padding_on_other_rotations(architecture, options):
    lm = lossy(options, {"sink": 2, "window": 3}, architecture)
    ids, pads = tokens(2, 40), [0, 5]
    together = generate(lm, *pad_left(ids, pads))
    alone = generate(lm, ids[1:, 5:])
    torch.testing.assert_close(together.logits[1:], alone.logits, **NEAR)


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("held", HELD, ids=str)
def test_right_padded_likelihood_equals_rows_alone(options, held):
    lm = lossy(options, held)
    ids, lengths = tokens(3, 21), [21, 9, 14]
    mask = (torch.arange(21)[None] < torch.tensor(lengths)[:, None]).long()
    together = lm.logits(ids * mask, mask)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(together[row : row + 1, :n], lm.logits(ids[row : row + 1, :n]), **NEAR)


@pytest.mark.parametrize("held", [{}, {"sink": 2}], ids=str)
def test_padding_is_counted_where_it_is_held_and_nowhere_else(held):
    lm = lossy({}, held)
    ids, pads = tokens(2, 22), [0, 9]
    report = generate(lm, *pad_left(ids, pads)).cache.audit()
    alone = [generate(lm, ids[row : row + 1, pad:]).cache.audit() for row, pad in enumerate(pads)]
    assert report["tokens"] == sum(a["tokens"] for a in alone) and report["encoded"] == sum(a["encoded"] for a in alone)
    stored = report["coded_values"] + report["exact_bytes"] / 4
    assert stored == report["slot_values"] == sum(a["slot_values"] for a in alone) + (0 if held else 9 * lm.model.config.num_hidden_layers * 64)


def test_a_first_chunk_of_padding_is_refused():
    lm = lossy({}, {"sink": 1})
    ids, mask = pad_left(tokens(2, 20), [0, 12])
    with pytest.raises(Refusal, match="larger chunk"):
        generate(lm, ids, mask, prefill_chunk_size=8)


@pytest.mark.parametrize("options", [{}, {"space": "pre", "block": 4}], ids=str)
@pytest.mark.parametrize("chunk", [5, 8, 16])
def test_chunked_prefill_stores_the_same_codes(options, chunk):
    lm = lossy(options, {"sink": 1})
    ids, mask = pad_left(tokens(2, 21), [0, 3])
    whole, parts = (generate(lm, ids, mask, steps=1, prefill_chunk_size=size) for size in (None, chunk))
    if options.get("block", 1) == 1:
        torch.testing.assert_close(parts.logits, whole.logits, **NEAR)
    first, again = (cache.quantized_layers[0].streams for cache in (whole.cache, parts.cache))
    for a, b in zip(first, again):
        torch.testing.assert_close(a.read(), b.read(), **NEAR)


@pytest.mark.parametrize("chunk", [None, 4, 8])
def test_exact_prefill_attends_in_full_precision_and_stores_codes(chunk):
    lm = lossy({}, {}, prefill="exact")
    ids = tokens(2, 22)
    ours, theirs = generate(lm, ids, steps=6, prefill_chunk_size=chunk), library(lm, ids, steps=6)
    torch.testing.assert_close(ours.logits[:, :1], theirs.logits[:, :1], **NEAR)
    assert distance(ours.logits[:, 1:], theirs.logits[:, 1:]) > FAR
    assert ours.cache.audit()["encoded"] == 2 * 27


def test_no_prefill_chunk_is_a_single_token(monkeypatch):
    lm = lossy({}, {}, prefill="exact")
    seen = []
    monkeypatch.setattr(lm.model, "generate", lambda ids, prefill_chunk_size, **_: seen.append((ids.shape[1], prefill_chunk_size)) or ids)
    for length in (2, 17, 21, 33, 41, 43):
        for chunk in (2, 4, 10, 16, 20):
            ids = tokens(1, length)
            lm.generate(ids, torch.ones_like(ids), 6, [1], chunk)
    assert len(seen) == 30 and all(length % chunk != 1 for length, chunk in seen)


def test_beams_may_follow_an_exact_prefill():
    lm = lossy({}, {"sink": 1}, prefill="exact")
    cache = lm.new_cache()
    ids = tokens(3, 20)
    forced(lm, ids[:2, :10], [10], cache)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    with torch.inference_mode():
        again = lm.model(ids[[1, 0, 1], 10:], position_ids=torch.arange(10, 20)[None], past_key_values=cache).logits
        plain = lm.model(ids[[1, 0, 1]]).logits
    torch.testing.assert_close(again, plain[:, 10:], **NEAR)


def test_an_unknown_protocol_is_refused():
    with pytest.raises(Refusal, match="quantized, exact"):
        bind(prefill="fast").new_cache()
