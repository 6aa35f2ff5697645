"""The cache adapter on tiny models: exact where it must be, lossy where it says so, and loud about what it cannot do."""

import inspect

import pytest
import torch
from transformers import DynamicCache, DynamicLayer
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from kvq import tiny
from kvq.baselines.fp16 import FP16
from kvq.cache import QuantizedCache, QuantizedLayer
from kvq.errors import Refusal
from tests.kvq.codecs import Exact, Lossy, Spy, bind, forced, generate, lossy_pairs, pad_left, pairs, tokens

NEAR = {"atol": 3e-5, "rtol": 0}
"""fp32 rounding on the tiny models, whose lossy codec moves logits by more than FAR."""
FAR = 1e-3
LAYOUTS = [
    {}, {"block": 4}, {"stateful": True}, {"space": "pre"}, {"space": "pre", "block": 4}, {"space": "pre", "stateful": True, "block": 2}
]  # fmt: skip
HELD = [{}, {"sink": 2}, {"window": 7}, {"sink": 3, "window": 5}]


def lossy(options: dict, held: dict, architecture: str = "llama", **more):
    return bind(architecture, lambda model: lossy_pairs(model, **options), **held, **more)


def library(lm, ids, mask=None, **options):
    return generate(lm, ids, mask, cache=DynamicCache(config=lm.model.config), **options)


def distance(a, b) -> float:
    return float((a - b).abs().max())


# Identity


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
    from types import SimpleNamespace

    config = model.config
    return SimpleNamespace(x=torch.zeros(config.num_key_value_heads, 4, config.head_dim), kind="key", layer=0, seed=0)


@pytest.mark.parametrize("architecture", ["llama", "llama31", "llama_yarn", "qwen3", "glm4", "gemma3"])
def test_keys_before_rope_come_back_as_they_were(architecture):
    lm = bind(architecture, lambda model: pairs(model, lambda: Exact("pre"), Exact))
    ids, mask = pad_left(tokens(2, 20), [0, 5])
    ours, theirs = generate(lm, ids, mask, steps=20), library(lm, ids, mask, steps=20)
    torch.testing.assert_close(ours.logits, theirs.logits, **NEAR)


# Loss, and only once


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


# Padding


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


# Chunks and protocols


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


# Ways of generating


@pytest.mark.parametrize("held", [{}, {"sink": 1, "window": 3}], ids=str)
@pytest.mark.parametrize("options", [{}, {"space": "pre", "block": 2, "stateful": True}], ids=str)
def test_beams_of_a_batch_are_the_beams_of_its_rows(options, held):
    lm = lossy(options, held)
    ids, pads = tokens(2, 15), [0, 4]
    beams = {"num_beams": 3, "num_return_sequences": 2}
    together = generate(lm, *pad_left(ids, pads), **beams)
    for row, pad in enumerate(pads):
        alone = generate(lm, ids[row : row + 1, pad:], **beams)
        assert torch.equal(together.tokens[2 * row : 2 * row + 2], alone.tokens)
    together.cache.audit()


def test_beams_equal_the_library_where_nothing_is_lost():
    lm = bind("llama", lambda model: pairs(model, Exact))
    ids, mask = pad_left(tokens(2, 15), [0, 4])
    assert torch.equal(*(out(lm, ids, mask, num_beams=4).tokens for out in (generate, library)))


def test_sampling_and_return_sequences():
    lm = bind("llama", lambda model: pairs(model, Exact))
    ids, mask = pad_left(tokens(2, 15), [0, 4])
    drawn = []
    for out in (generate, library):
        torch.manual_seed(3)
        drawn.append(out(lm, ids, mask, do_sample=True, num_return_sequences=3, temperature=2.0).tokens)
    assert drawn[0].shape == (6, 6) and torch.equal(*drawn)


def test_batch_repeat_and_select():
    lm = lossy({"space": "pre"}, {"sink": 1, "window": 2})
    ids = tokens(2, 12)
    cache = lm.new_cache()
    forced(lm, ids[:, :10], [10], cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 2]))
    positions = torch.tensor([[10, 11]])
    with torch.inference_mode():
        logits = lm.model(ids[:, 10:], position_ids=positions, past_key_values=cache).logits
    torch.testing.assert_close(logits, forced(lm, ids, [10, 2])[:, 10:], **NEAR)
    assert cache.audit()["tokens"] == 24


# What is not supported says so


def test_assisted_and_prompt_lookup_decoding_say_what_is_missing():
    lm = bind()
    with pytest.raises((NotImplementedError, Refusal), match="cropped|not supported"):
        generate(lm, tokens(1, 12).repeat(1, 2), prompt_lookup_num_tokens=2, steps=12)
    with pytest.raises((NotImplementedError, Refusal), match="cropped|not supported"):
        lm.new_cache().crop(-1)


def test_offloading_says_so():
    layer = bind().new_cache().layers[0]
    for call in (layer.offload, layer.prefetch):
        with pytest.raises(NotImplementedError, match="offloaded"):
            call()


READERS = {"get_mask_sizes", "get_max_length"}
"""Inherited methods that touch no stored token; get_mask_sizes asks get_seq_length, which is ours."""


def test_every_inherited_method_that_touches_tokens_is_ours():
    inherited = {name for name, _ in inspect.getmembers(DynamicLayer, inspect.isfunction) if not name.startswith("_")}
    assert {n for n in inherited if n not in vars(QuantizedLayer)} == READERS
    assert QuantizedLayer.is_croppable is False and QuantizedLayer._layer_type is None


def test_the_librarys_own_layers_stay_registered():
    assert DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] is DynamicLayer
    assert not [kind for kind, layer in DYNAMIC_LAYER_TYPE_MAPPING.items() if layer.__module__.startswith("kvq")]
    assert all(type(layer) is DynamicLayer for layer in DynamicCache(config=tiny.load("llama", "float32", "cpu")[0].config).layers)
    assert issubclass(QuantizedLayer, CacheLayerMixin)


@pytest.mark.parametrize("keyword", ["softcap", "s_aux", "position_bias", "sliding_window"])
def test_an_unknown_attention_keyword_is_refused_by_name(keyword):
    lm = bind()
    with pytest.raises(Refusal, match=keyword), torch.inference_mode():
        lm.model(tokens(1, 5), past_key_values=lm.new_cache(), **{keyword: torch.ones(1)})


def test_a_handle_that_nobody_reads_is_refused():
    lm = bind()
    layer = lm.new_cache().layers[0]
    x = torch.zeros(1, 2, 3, 16)
    layer.update(x, x)
    with pytest.raises(Refusal, match="does not call the registered attention"):
        layer.update(x, x)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_model_that_bypasses_our_attention_cannot_be_scored(implementation):
    model, tokenizer = tiny.load("llama", "float32", "cpu", 7)
    lm = bind()
    lm.model = model
    try:
        model.set_attn_implementation(implementation)
        with pytest.raises(Refusal, match="attention"):
            lm.logits(tokens(1, 5))
    finally:
        model.set_attn_implementation("kvq")


def test_a_cache_that_was_never_filled_fails_the_audit():
    cache = bind().new_cache()
    with pytest.raises(RuntimeError, match="never saw a token"):
        cache.audit()


def test_a_lost_token_fails_the_audit():
    lm = bind()
    cache = lm.new_cache()
    forced(lm, tokens(1, 9), [9], cache)
    cache.layers[1].streams[0].encoded -= 1
    with pytest.raises(RuntimeError, match="Layer 1: keys hold 8 coded"):
        cache.audit()
    with pytest.raises(RuntimeError, match="not valid"):
        lm.usage()


def test_every_call_gets_a_cache_of_its_own():
    lm = bind()
    first, again = (lm.logits(tokens(2, 10)) for _ in range(2))
    assert torch.equal(first, again) and lm.new_cache().get_seq_length() == 0
    usage = lm.usage()
    assert usage["tokens"] == 40 and usage["encoded"] == 40 and lm.usage() == {}


def test_reset_empties():
    lm = bind(window=3)
    cache = lm.new_cache()
    before = forced(lm, tokens(1, 9), [9], cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.layers[0].streams
    assert torch.equal(forced(lm, tokens(1, 9), [9], cache), before)


# Layer types


def test_a_model_of_sliding_layers_only_is_refused_by_type():
    with pytest.raises(Refusal, match="mistral.*sliding_attention.*sliding_window=null"):
        bind("mistral")


def test_full_layers_are_quantized_and_sliding_ones_left_to_the_library():
    lm = bind("gemma3")
    cache = lm.new_cache()
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "QuantizedLayer"]
    out = generate(lm, *pad_left(tokens(2, 50), [0, 7]), steps=10)
    report = out.cache.audit()
    assert report["encoded"] == report["tokens"] == 2 * 59 - 7
    sliding = out.cache.layers[0]
    assert report["exact_bytes"] == sum(x.numel() * 4 for x in (sliding.keys, sliding.values))


def test_layers_without_codecs_may_be_none():
    model, _ = tiny.load("gemma3", "float32", "cpu")
    codecs = lossy_pairs(model)
    lm = bind("gemma3", [(None, None), codecs[1]])
    assert lm.logits(tokens(1, 6)).isfinite().all() and lm.usage()["encoded"] == 6


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_softcaps_and_attention_sinks_are_refused(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**tiny.SHAPE, "head_dim": 16, "vocab_size": 320, "num_local_experts": 2, "pad_token_id": 0})
    config.layer_types = ["full_attention", "sliding_attention"]
    model = AutoModelForCausalLM.from_config(config, attn_implementation="kvq").eval()
    cache = QuantizedCache(config, lossy_pairs(model))
    with pytest.raises(Refusal, match="softcap|s_aux"), torch.inference_mode():
        model(tokens(1, 5), past_key_values=cache)


def test_keys_before_rope_need_positions():
    layer = QuantizedLayer(Lossy(space="pre"), Lossy(), sink=0, window=0, prefill="quantized", memo=True)
    x = torch.zeros(1, 2, 3, 16)
    layer.update(x, x)
    with pytest.raises(Refusal, match="position_ids"):
        layer.attend(x, None, None)
