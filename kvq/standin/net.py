"""The stand-in as it is trained: a Llama whose layers are one compiled function, exported to transformers by name.

Layers, widths and rotation follow transformers' LlamaForCausalLM exactly; a test compares the two outputs.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

EPS = 1e-5
SHARD = "12MB"
LAYER = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def config(vocabulary: int = 4096, hidden: int = 320, layers: int = 7, inner: int = 960) -> LlamaConfig:
    """4 query and 2 KV heads of 128 channels, RoPE base 5e5, 16,384 positions, tied embeddings."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=128, max_position_embeddings=16384, rms_norm_eps=EPS, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, dtype="bfloat16")


def rotation(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of RoPE with the two halves of a head paired."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def layer(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, norm2: Tensor, gate: Tensor, up: Tensor,
          down: Tensor) -> Tensor:
    """One decoder layer on x [B, T, C]; a function of its weights, so that one compilation serves all layers."""
    batch, length, _ = x.shape
    y = F.rms_norm(x, (x.shape[-1],), norm, EPS)
    heads = [F.linear(y, w).view(batch, length, -1, cos.shape[-1]).transpose(1, 2) for w in (q, k, v)]
    mixed = F.scaled_dot_product_attention(rotate(heads[0], cos, sin), rotate(heads[1], cos, sin), heads[2], is_causal=True, enable_gqa=True)
    x = x + F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), o)
    y = F.rms_norm(x, (x.shape[-1],), norm2, EPS)
    return x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)


def weighted_loss(x: Tensor, norm: Tensor, table: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Next-token loss in nats, each target's loss times its weight, divided by the weights' sum."""
    logits = F.linear(F.rms_norm(x, (x.shape[-1],), norm, EPS), table).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum().clamp(min=1)


class Net(nn.Module):
    """Weights under transformers' own names, dots written as double underscores."""

    def __init__(self, config: LlamaConfig, compiled: bool = True):
        super().__init__()
        reference = LlamaForCausalLM(config).float()
        self.config, self.names = config, [name for name, _ in reference.named_parameters()]
        self.weights = nn.ParameterDict({name.replace(".", "__"): parameter for name, parameter in reference.named_parameters()})
        for name, weight in self.weights.items():
            if weight.ndim == 2:
                deep = (2 * config.num_hidden_layers) ** -0.5 if name.endswith(("o_proj__weight", "down_proj__weight")) else 1.0
                nn.init.normal_(weight, std=0.02 if "embed" in name else deep * weight.shape[1] ** -0.5)
        self.layer, self.head = (torch.compile(layer, dynamic=False), torch.compile(weighted_loss, dynamic=False)) if compiled else (layer, weighted_loss)

    def weight(self, name: str) -> Tensor:
        return self.weights[f"model.{name}.weight".replace(".", "__")]

    def matrices(self) -> list[nn.Parameter]:
        """The layers' matrices; what is left are the embedding and the norms."""
        return [weight for name, weight in self.weights.items() if weight.ndim == 2 and "embed" not in name]

    def rest(self) -> list[nn.Parameter]:
        """The embedding table and the norms."""
        return [weight for name, weight in self.weights.items() if weight.ndim == 1 or "embed" in name]

    def hidden(self, ids: Tensor) -> Tensor:
        """The last layer's output [B, T, C] for ids [B, T]."""
        cos, sin = rotation(ids.shape[1], self.config.head_dim, self.config.rope_parameters["rope_theta"], ids.device)
        x = F.embedding(ids, self.weight("embed_tokens"))
        for index in range(self.config.num_hidden_layers):
            x = self.layer(x, cos, sin, *(self.weight(f"layers.{index}.{name}") for name in LAYER))
        return x

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted loss of rows ids [B, T + 1], weights [B, T + 1] belonging to the targets."""
        return self.head(self.hidden(ids[:, :-1]), self.weight("norm"), self.weight("embed_tokens"), ids[:, 1:], weights[:, 1:])

    def load(self, folder: Path) -> None:
        """Continue from a saved folder."""
        state = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        with torch.no_grad():
            for name in self.names:
                self.weights[name.replace(".", "__")].copy_(state[name])

    def save(self, folder: Path) -> None:
        """Write a transformers folder in bf16, in shards small enough to be tracked."""
        model = LlamaForCausalLM(self.config)
        state = {name: self.weights[name.replace(".", "__")].detach().cpu().float() for name in self.names}
        model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
        model.generation_config.update(bos_token_id=0, eos_token_id=1, pad_token_id=2)
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
