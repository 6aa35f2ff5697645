"""RoPE undone and read off the model: every architecture's own rotation, its scaling, its pairs and its layer's base."""

import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvq import tiny
from kvq.errors import Refusal
from kvq.models import LM
from kvq.rope import MOVING_TABLES, Rope
from tests.kvq.codecs import forced, lossy_pairs, tokens

ROTATING = [name for name in tiny.ARCHITECTURES if name != "deepseek_v2"]
LENGTH = 300


def rope_of(name: str) -> Rope:
    return Rope(tiny.load(name, "float32", "cpu")[0])


def keys(rope: Rope, heads: int = 2) -> torch.Tensor:
    return torch.randn(2, heads, LENGTH, rope.head_dim, generator=torch.Generator().manual_seed(0))


def positions() -> torch.Tensor:
    return torch.stack([torch.arange(LENGTH), torch.arange(LENGTH) * 7 + 3])


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ROTATING)
def test_undo_is_exact_to_rounding(name, layer):
    rope = rope_of(name)
    x = keys(rope)
    turned = rope.rotate(x, positions(), layer)
    assert turned.dtype == torch.float32 and (turned - x).abs().max() > 0.5
    torch.testing.assert_close(rope.unrotate(turned, positions(), layer), x, atol=2e-6, rtol=0)
    torch.testing.assert_close(rope.rotate(rope.unrotate(x, positions(), layer), positions(), layer), x, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ROTATING)
def test_it_is_the_rotation_that_the_model_caches(name):
    model, _ = tiny.load(name, "float32", "cpu")
    layer = [i for i, kind in enumerate(getattr(model.config, "layer_types", None) or ["full_attention"] * 2) if kind == "full_attention" or name == "mistral"][-1]
    rope, seen = Rope(model), {}
    attention = model.model.layers[layer].self_attn
    source = getattr(attention, "k_norm", None) or attention.k_proj
    hook = source.register_forward_hook(lambda module, args, out: seen.update(before=out))
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(tokens(1, 20), past_key_values=cache)
    hook.remove()
    before = seen["before"]
    if before.shape[1] == 20:  # heads not yet in front
        before = before.view(1, 20, -1, rope.head_dim).transpose(1, 2)
    torch.testing.assert_close(rope.rotate(before, torch.arange(20)[None], layer), cache.layers[layer].keys, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ROTATING)
def test_pairs_are_the_two_by_two_blocks_of_the_models_rotation(name):
    rope = rope_of(name)
    layer = 1
    pairs, inv_freq = rope.pairs(layer)
    assert pairs.shape == (len(inv_freq), 2) and len(set(pairs.flatten().tolist())) == pairs.numel() <= rope.head_dim
    assert (inv_freq > 0).all() and (inv_freq.diff() <= 0).all()
    q, k = keys(rope)[:1], keys(rope, 3)[:1, 1:]
    at, delta = torch.zeros(1, LENGTH, dtype=torch.long) + 5, torch.arange(LENGTH)[None]
    own = (rope.rotate(q, at + delta, layer) * rope.rotate(k, at, layer)).sum(-1)
    still = torch.ones(rope.head_dim, dtype=torch.bool)
    still[pairs.flatten()] = False
    (a, b), (c, d) = (x[..., pairs].unbind(-1) for x in (k, q))
    angle = delta[0, :, None].double() * inv_freq.double()
    cos, sin = angle.cos(), angle.sin()
    turned = c * (a * cos - b * sin) + d * (a * sin + b * cos)  # q^T R_delta k, block by block
    reverse = c * (a * cos + b * sin) + d * (b * cos - a * sin)
    mine = reverse.sum(-1) * rope.scaling(layer) ** 2 + (q * k)[..., still].sum(-1)
    other = turned.sum(-1) * rope.scaling(layer) ** 2 + (q * k)[..., still].sum(-1)
    torch.testing.assert_close(mine.float(), own, atol=2e-3, rtol=1e-3)
    assert (other - own).abs().max() > 0.1, "the direction of rotation is not told apart"


def test_what_makes_these_architectures_different():
    llama, llama31, yarn = (rope_of(name) for name in ("llama", "llama31", "llama_yarn"))
    assert llama.scaling() == llama31.scaling() == pytest.approx(1.0) and yarn.scaling() == pytest.approx(1.1386, abs=1e-4)
    assert llama31.pairs()[1][-1] < 5e5 ** (-7 / 8) / 7.9
    assert llama.pairs()[0].tolist() == [[i, i + 8] for i in range(8)]
    assert rope_of("glm4").pairs()[0].tolist() == [[i, i + 1] for i in range(0, 8, 2)]
    gemma = rope_of("gemma3")
    assert gemma.pairs(0)[1][1] > gemma.pairs(1)[1][1] * 1.5


@pytest.mark.parametrize("name", ["glm4"])
def test_channels_without_rotation_are_left_alone(name):
    rope = rope_of(name)
    x = keys(rope)
    assert torch.equal(rope.rotate(x, positions())[..., 8:], x[..., 8:])


def test_half_precision_keys_are_turned_in_full_precision():
    rope = rope_of("llama31")
    x = keys(rope).bfloat16()
    assert torch.equal(rope.rotate(x, positions()), rope.rotate(x.float(), positions()))


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**tiny.SHAPE, "vocab_size": 320, **changes}, attn_implementation="kvq")).eval()


MOVING = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "longrope": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", MOVING_TABLES)
def test_moving_tables_serve_only_keys_after_rope(kind):
    model = llama(rope_parameters=MOVING[kind], max_position_embeddings=64)
    with pytest.raises(Refusal, match=f"'{kind}'.*space=post"):
        LM(model, None, "moving", lossy_pairs(model, space="pre"))
    lm = LM(model, None, "moving", lossy_pairs(model))
    ids = tokens(1, 100)
    assert lm.logits(ids).isfinite().all()


@pytest.mark.parametrize("kind", MOVING_TABLES)
def test_moving_tables_are_refused_before_calibration(kind):
    from kvq import calibrate
    from tests.kvq.codecs import Lossy

    model = llama(rope_parameters=MOVING[kind], max_position_embeddings=64)
    with pytest.raises(Refusal, match=f"'{kind}'.*space=post"):
        calibrate.fit(model, [tokens(1, 16)[0]], lambda: Lossy(space="pre"), Lossy, seed=0, memory_gb=1)


def test_a_model_without_rotary_embedding_serves_keys_as_they_are():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=320, attn_implementation="kvq")).eval()
    with pytest.raises(Refusal, match="no rotary embedding.*space=post"):
        LM(model, None, "gpt2", lossy_pairs(model, space="pre"))
    lm = LM(model, None, "gpt2", lossy_pairs(model))
    ids = tokens(1, 20)
    torch.testing.assert_close(forced(lm, ids, [1] * 20), lm.logits(ids), atol=3e-5, rtol=0)


def test_a_missing_rotation_function_is_refused(monkeypatch):
    model = llama()
    monkeypatch.delattr(sys.modules[type(model.model).__module__], "apply_rotary_pos_emb")
    with pytest.raises(Refusal, match="function of its own"):
        Rope(model)


def test_wrong_positions_would_be_seen():
    """Undoing and redoing at the same wrong positions is the identity, so the padded-row tests of the cache use lossy codecs."""
    rope = rope_of("llama")
    x = keys(rope)
    torch.testing.assert_close(rope.rotate(rope.unrotate(x, positions() + 9), positions() + 9), x, atol=2e-6, rtol=0)
    assert (rope.unrotate(x, positions() + 9) - rope.unrotate(x, positions())).abs().max() > 0.1
