"""Tiny random-weight models of the architectures the papers use, for tests and smoke runs without any download."""

import functools

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvq.cache import ATTENTION
from kvq.errors import Refusal
from kvq.models import ROOT, resolve

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": []}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
          "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1}  # fmt: skip

ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {"head_dim": 16}),
    "llama31": ("llama", {"head_dim": 16, "rope_parameters": LLAMA3}),
    "llama_yarn": ("llama", {"head_dim": 16, "rope_parameters": YARN}),
    "qwen25": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, **EXPERTS}),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": 4096}),
    "mistral_nemo": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "glm4": ("glm", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}),
    "deepseek_v2": ("deepseek_v2", LATENT),
}
"""Name to (transformers model type, config changes): the panels of both papers in miniature."""


@functools.cache
def load(architecture: str, dtype: str = "auto", device: str = "auto", seed: int = 0):
    """(model, tokenizer): random weights from `seed`, the stand-in's tokenizer. Raises Refusal on an unknown architecture."""
    if architecture not in ARCHITECTURES:
        raise Refusal(f"model.architecture={architecture} is not one of {', '.join(ARCHITECTURES)}.")
    kind, changes = ARCHITECTURES[architecture]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "kvq" / "standin" / "model")
    config = AutoConfig.for_model(kind, **{**SHAPE, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, **changes})
    dtype, device = resolve(dtype, device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION)
        if kind == "qwen2":
            for layer in model.model.layers:
                torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=2.0)
    return model.to(getattr(torch, dtype)).to(device).eval(), tokenizer
