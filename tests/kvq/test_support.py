"""Ways of generating over the quantized cache, and every unsupported way, model or layer refused with a sentence."""

import inspect

import pytest
import torch
from transformers import DynamicCache, DynamicLayer
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from kvq import tiny
from kvq.cache import QuantizedCache
from kvq.errors import Refusal
from kvq.layer import QuantizedLayer
from kvq.mla import LatentLayer
from tests.kvq.codecs import NEAR, Exact, Lossy, bind, forced, generate, library, lossy, lossy_pairs, pad_left, pairs, tokens


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
    cache.batch_select_indices(torch.tensor([1, 2, 3]))
    rows = torch.tensor([0, 1, 1])
    with torch.inference_mode():
        logits = lm.model(ids[rows, 10:], position_ids=torch.tensor([[10, 11]]), past_key_values=cache).logits
    torch.testing.assert_close(logits, forced(lm, ids, [10, 2])[rows, 10:], **NEAR)
    assert cache.audit()["tokens"] == 36


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
OLD_NAMES = {"get_max_cache_shape"}
"""Readers under the name that they had before transformers 5.20."""


def test_every_inherited_method_that_touches_tokens_is_ours():
    inherited = {name for name, _ in inspect.getmembers(DynamicLayer, inspect.isfunction) if not name.startswith("_")}
    assert {n for n in inherited if n not in vars(QuantizedLayer)} - OLD_NAMES == READERS
    for layer in (QuantizedLayer, LatentLayer):
        assert layer.is_croppable is False and layer._layer_type is None


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
