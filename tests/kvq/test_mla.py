"""Multi-head latent attention: the rotary key is coded once, the latent comes back bit for bit and is counted."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kvq import calibrate, tiny
from kvq.cache import QuantizedCache, coded_shapes, is_latent
from kvq.errors import Refusal
from kvq.models import LM
from kvq.rope import Rope
from tests.kvq.codecs import Lossy, Spy, bind, forced, generate, lossy_pairs, pad_left, tokens
from tests.kvq.test_record import Curious

NEAR, FAR = {"atol": 3e-5, "rtol": 0}, 1e-4


@pytest.fixture(scope="module", params=["deepseek_v2", "deepseek_v3"])
def model(request):
    if request.param == "deepseek_v2":
        return tiny.load("deepseek_v2", "float32", "cpu")[0]
    torch.manual_seed(0)
    groups = {"n_group": 1, "topk_group": 1}
    config = AutoConfig.for_model(request.param, **{**tiny.SHAPE, **tiny.LATENT, **groups, "vocab_size": 320, "pad_token_id": 0})
    return AutoModelForCausalLM.from_config(config, attn_implementation="kvq").eval()


def lm_of(model, codecs=None, **options) -> LM:
    return LM(model, None, "latent", codecs or lossy_pairs(model), **options)


def test_it_is_told_by_the_configuration(model):
    assert is_latent(model.config) and coded_shapes(model.config) == {"key": (1, 16)}
    assert not is_latent(tiny.load("llama", "float32", "cpu")[0].config)


@pytest.mark.parametrize("memo", [True, False])
def test_only_the_rotary_key_is_coded_and_each_token_once(model, memo):
    spies = [(Spy(), Spy()) for _ in range(2)]
    lm = lm_of(model, spies, sink=2, window=5, memo=memo)
    out = generate(lm, tokens(1, 21), steps=9)
    for key, value in spies:
        assert sum(x.shape[2] for x in key.seen) == 29 - 7 and not value.seen
        assert all(x.shape[1:2] + x.shape[3:] == (1, 16) for x in key.seen)
    report = out.cache.audit()
    assert report["tokens"] == 29 and report["encoded"] == 22
    assert report["coded_values"] == 2 * 22 * 16 and report["exact_bytes"] == 2 * 4 * (29 * 32 + 7 * 16)
    assert report["slot_values"] == 2 * 29 * 48


def test_the_latent_is_exact_and_the_rotary_key_is_what_the_codec_decodes(model):
    cache = QuantizedCache(model.config, lossy_pairs(model))
    latent, rotary = torch.randn(2, 1, 7, 32), torch.randn(2, 1, 7, 16)
    cache.layers[0].update(latent[:, :, :4], rotary[:, :, :4])
    kept, decoded = cache.layers[0].update(latent[:, :, 4:], rotary[:, :, 4:])
    codec = Lossy()
    assert torch.equal(kept, latent) and torch.equal(decoded, codec.decode(codec.encode(rotary)))


def test_a_window_over_everything_is_the_library_bit_for_bit(model):
    lm = lm_of(model, window=64)
    ids, mask = pad_left(tokens(3, 20), [0, 4, 6])
    ours, theirs = (generate(lm, ids, mask, cache=cache) for cache in (None, DynamicCache(config=model.config)))
    assert torch.equal(ours.logits, theirs.logits)


def test_one_pass_equals_token_by_token_and_rows_alone(model):
    lm = lm_of(model)
    ids = tokens(3, 20)
    whole = lm.logits(ids)
    torch.testing.assert_close(forced(lm, ids, [1] * 20), whole, **NEAR)
    torch.testing.assert_close(lm.logits(ids[1:2]), whole[1:2], **NEAR)
    with torch.inference_mode():
        assert (whole - model(ids).logits).abs().max() > FAR
    together = generate(lm, *pad_left(ids, [0, 3, 8]))
    torch.testing.assert_close(together.logits[2:], generate(lm, ids[2:, 8:]).logits, **NEAR)


def test_exact_prefill_stores_codes(model):
    lm = lm_of(model, prefill="exact")
    ours, theirs = (generate(lm, tokens(2, 20), cache=cache) for cache in (None, DynamicCache(config=model.config)))
    torch.testing.assert_close(ours.logits[:, :1], theirs.logits[:, :1], **NEAR)
    assert (ours.logits[:, 1:] - theirs.logits[:, 1:]).abs().max() > FAR and ours.cache.audit()["encoded"] == 2 * 25


def test_beams_of_a_batch_are_the_beams_of_its_rows(model):
    lm = lm_of(model, window=3)
    ids = tokens(2, 15)
    together = generate(lm, ids, num_beams=3)
    for row in range(2):
        assert torch.equal(together.tokens[row : row + 1], generate(lm, ids[row : row + 1], num_beams=3).tokens)


@pytest.mark.parametrize("options,held", [({"block": 4}, {}), ({"stateful": True}, {}), ({}, {"sink": 1})], ids=str)
def test_what_padding_could_enter_needs_batches_of_one(model, options, held):
    lm = lm_of(model, lossy_pairs(model, **options), **held)
    assert lm.logits(tokens(1, 9)).isfinite().all()
    with pytest.raises(Refusal, match="task.batch_size=1"):
        lm.logits(tokens(2, 9))


def test_keys_before_rope_are_refused(model):
    with pytest.raises(Refusal, match="latent.*space=post"):
        lm_of(model, lossy_pairs(model, space="pre"))
    with pytest.raises(Refusal, match="latent.*space=post"):
        calibrate.fit(model, list(tokens(1, 16)), lambda: Lossy(space="pre"), Lossy, seed=0, memory_gb=1)


def test_other_slots_are_refused():
    layer = bind("deepseek_v2").new_cache().layers[0]
    with pytest.raises(Refusal, match="2 heads"):
        layer.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))


def test_the_rotary_key_is_recorded_with_the_queries_that_meet_it(model):
    samples = list(tokens(2, 24))
    codecs = calibrate.fit(model, samples, lambda: Curious("post", 4), lambda: Curious("post", 4), seed=0, memory_gb=1)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(samples[1][None], past_key_values=cache)
    for layer, (key, value) in enumerate(codecs):
        assert value is None
        found = key.calibration
        torch.testing.assert_close(found.x[:, 24:], cache.layers[layer].values[0], atol=1e-6, rtol=1e-5)
        assert found.queries.shape == (4, 48, 16) and found.grads.shape == (48, 4) and found.grads.isfinite().all() and found.grads.max() > 0
        assert found.pairs.shape == (8, 2) and (found.inv_freq.diff() < 0).all()
    assert all(p.grad is None for p in model.parameters())


def test_pairs_are_those_of_the_cached_key(model):
    found = calibrate.fit(model, list(tokens(1, 24)), Curious, Curious, seed=0, memory_gb=1)[0][0].calibration
    rope = Rope(model)
    wanted = [[2 * i, 2 * i + 1] for i in range(8)] if model.config.model_type == "deepseek_v2" else [[i, i + 8] for i in range(8)]
    assert found.pairs.tolist() == wanted and rope.head_dim == 16
    x = torch.randn(1, 1, 30, 16)
    at = torch.arange(30)[None] * 3
    torch.testing.assert_close(rope.unrotate(rope.rotate(x, at), at), x, atol=2e-6, rtol=0)


def test_block_gtq_runs_on_the_rotary_key():
    from tests import quants

    model, tokenizer = tiny.load("deepseek_v2", "float32", "cpu")
    node = quants.load("blockgtq", 2)
    codecs = calibrate.fit(model, list(tokens(2, 160)), quants.maker(node, "key"), quants.maker(node, "value"), seed=0, memory_gb=1)
    lm = LM(model, tokenizer, "latent", codecs)
    assert lm.logits(tokens(2, 20)).isfinite().all()
    usage = lm.usage()
    assert usage["encoded"] == 40 and 8 * usage["code_bytes"] / usage["coded_values"] == codecs[0][0].bits
