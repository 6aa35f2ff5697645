"""Models of published shapes with random weights, for timing: nothing is downloaded and nothing they say means anything.

Times of dense layers do not depend on weights. Those of a cache whose bits follow the keys do, so keys get what real ones have: energies per
RoPE block that are log-normal with the spread that reproduces the widths of arXiv 2606.24033, Table 8 (as `kernels.synthetic`).
"""

import functools

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvq.cache import ATTENTION
from kvq.errors import Refusal
from kvq.models import ROOT, resolve

SPREAD = 0.75
SHAPES: dict[str, tuple[str, dict]] = {
    "qwen25_3b": ("qwen2", {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
                            "vocab_size": 151936, "tie_word_embeddings": True, "rope_theta": 1e6, "max_position_embeddings": 32768}),
    "qwen25_7b": ("qwen2", {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                            "vocab_size": 152064, "tie_word_embeddings": False, "rope_theta": 1e6, "max_position_embeddings": 131072}),
    "llama31_8b": ("llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                             "vocab_size": 128256, "tie_word_embeddings": False, "rope_theta": 5e5, "max_position_embeddings": 131072, "head_dim": 128}),
}  # fmt: skip
"""Name to (transformers model type, config): the published config.json, RoPE scaling left out because it moves no byte."""


def config(shape: str, layers: int | None = None):
    """The transformers config of a shape, cut to `layers` decoder layers. Raises Refusal on an unknown shape or an impossible number of layers."""
    if shape not in SHAPES:
        raise Refusal(f"model.shape={shape} is not one of {', '.join(SHAPES)}.")
    kind, values = SHAPES[shape]
    values = dict(values)
    if layers is not None:
        if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= values["num_hidden_layers"]:
            raise Refusal(f"model.layers={layers} is not a whole number from 1 to {values['num_hidden_layers']}.")
        values["num_hidden_layers"] = layers
    theta = values.pop("rope_theta")
    return AutoConfig.for_model(kind, **values, rope_parameters={"rope_type": "default", "rope_theta": theta})


@functools.lru_cache(maxsize=1)
def load(shape: str, layers: int | None = None, dtype: str = "auto", device: str = "auto", seed: int = 0):
    """(model, tokenizer): random weights made on the device, the stand-in's tokenizer. Raises Refusal as :func:`config`."""
    made = config(shape, layers)
    dtype, device = resolve(dtype, device)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(made, dtype=getattr(torch, dtype), attn_implementation=ATTENTION)
        _spread_keys(model, seed)
    return model.eval(), AutoTokenizer.from_pretrained(ROOT / "kvq" / "standin" / "model")


load.config = lambda shape, layers=None, **_: config(shape, layers)  # what an estimate needs


@torch.no_grad()
def _spread_keys(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        weight = layer.self_attn.k_proj.weight
        scale = 2 ** (SPREAD * torch.randn(weight.shape[0] // layer.self_attn.head_dim, 1, layer.self_attn.head_dim // 2, generator=generator, device="cpu"))
        weight *= scale.expand(-1, 2, -1).reshape(-1, 1).to(weight)  # channels i and i + D/2 turn together
