"""Random models have the published sizes, and keys whose bits spread as published."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from blockgtq import BlockGTQ
from kvq import shapes
from kvq.errors import Refusal
from kvq.quantizer import Calibration

PARAMETERS = {"qwen25_3b": 3_085_938_688, "qwen25_7b": 7_615_616_512, "llama31_8b": 8_030_261_248}


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_parameters_are_those_of_the_published_model(shape):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.config(shape))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[shape]
    assert model.model.layers[0].self_attn.head_dim == 128


def test_an_estimate_makes_no_weights(tmp_path, monkeypatch):
    from kvq import runner
    from tests.tasks.test_canary import compose

    monkeypatch.setattr(runner, "_load", lambda cfg: pytest.fail("8 billion weights were made to count them"))
    cfg = compose("model=random_llama31_8b", "model.dtype=float16", "quant=tq_mse", "bits=2", "task=latency", f"results={tmp_path}", f"outputs={tmp_path}")
    cell = runner.prepare(cfg, {"model": "random_llama31_8b", "quant": "tq_mse", "task": "latency", "calib": "text"})
    assert runner._estimate(cell).weights == 2 * PARAMETERS["llama31_8b"]


def test_layers_are_cut_and_wrong_names_refused():
    assert shapes.config("llama31_8b", 2).num_hidden_layers == 2
    with pytest.raises(Refusal, match="qwen25_3b"):
        shapes.config("qwen3b")
    with pytest.raises(Refusal, match="from 1 to 36"):
        shapes.config("qwen25_3b", 37)


def test_loaded_weights_are_random_and_keys_have_energies_per_rope_block(monkeypatch):
    little = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
              "vocab_size": 512, "tie_word_embeddings": True, "rope_theta": 5e5, "max_position_embeddings": 512}  # fmt: skip
    monkeypatch.setitem(shapes.SHAPES, "little", ("llama", little))
    before = torch.random.get_rng_state()
    model, tokenizer = shapes.load("little", None, "float32", "cpu")
    assert torch.equal(torch.random.get_rng_state(), before) and len(tokenizer) > 0
    weight = model.model.layers[0].self_attn.k_proj.weight.detach().view(2, 2, 64, 256)
    energy = weight.square().sum((1, 3)).log2() / 2
    assert 0.55 < float(energy.std()) < 0.95
    x = torch.einsum("hpic,nc->hnpi", weight, torch.randn(512, 256)).flatten(2)
    pairs = torch.arange(128).view(2, -1).T
    inv_freq = 5e5 ** (-torch.arange(64) / 64)
    codec = BlockGTQ(3, seed=0).fit(Calibration(x, "key", 0, 0, torch.arange(512), 512, queries=torch.randn(4, 512, 128), pairs=pairs, inv_freq=inv_freq))
    assert 3 <= len(codec.widths.unique()) <= 8, "not one width for all"
