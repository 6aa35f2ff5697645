"""Rotary position embedding applied and undone at given positions, through the model's own function.

Nothing is copied from a modeling file: the rotation is the model module's `apply_rotary_pos_emb`, and which channels form a pair
(split-half, interleaved, partial) is read off that function, so a codec never guesses the layout.
"""

import functools
import sys

import torch
from torch import Tensor, nn

from kvq.errors import Refusal

MOVING_TABLES = ("dynamic", "longrope")
"""RoPE types whose frequencies change with the sequence length: a key cannot be un-rotated later."""


class Rope:
    """The rotation of one model. `rotate` and `unrotate` take [B, H, T, D] and positions [B, T]; both return float32."""

    def __init__(self, model: nn.Module):
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        self.module = getattr(decoder, "rotary_emb", None)
        if self.module is None:
            raise Refusal(f"{type(model).__name__} has no rotary embedding that can be found as `rotary_emb`; use a codec with space=post.")
        config = model.config.get_text_config(decoder=True)
        self.is_latent = bool(getattr(config, "kv_lora_rank", None))
        self.head_dim = config.qk_rope_head_dim if self.is_latent else getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.layer_types = getattr(config, "layer_types", None)
        source = sys.modules[type(decoder).__module__]
        self._apply = getattr(source, "apply_rotary_pos_emb", None) or getattr(source, "apply_rotary_emb", None)
        if self._apply is None:
            raise Refusal(f"{type(model).__name__} rotates keys with a function of its own; use a codec with space=post.")
        # Cached per object, so that a sweep over models does not keep their tables.
        self.scaling, self.pairs = functools.cache(self.scaling), functools.cache(self.pairs)

    def check_undo(self) -> None:
        """Raise Refusal where keys cannot be coded before RoPE: latents, and frequencies that depend on the sequence length."""
        if self.is_latent:
            raise Refusal("Multi-head latent attention caches its rotary key apart from the latent, after RoPE; use a codec with space=post.")
        types = self.module.rope_type
        for kind in types.values() if isinstance(types, dict) else [types]:
            if kind in MOVING_TABLES:
                raise Refusal(f"RoPE type '{kind}' changes its frequencies as the sequence grows; use a codec with space=post.")

    def tables(self, positions: Tensor, layer: int) -> tuple[Tensor, ...]:
        """(cos, sin) of positions [B, T], float32 [B, T, D or D / 2] with the scaling, or one complex table (DeepSeek-V2)."""
        probe = torch.empty(0, dtype=torch.float32, device=positions.device)
        by_layer = isinstance(getattr(self.module, "rope_type", None), dict)
        tables = self.module(probe, positions, self.layer_types[layer]) if by_layer else self.module(probe, positions)
        tables = tables if isinstance(tables, tuple) else (tables,)
        return tuple(table.to(positions.device) for table in tables)  # accelerate computes them where the rotary module is

    def scaling(self, layer: int = 0) -> float:
        """The attention scaling that the tables carry (1 except for YaRN and its kin)."""
        tables = self.tables(torch.ones(1, 1, dtype=torch.long, device=self._device()), layer)
        return float(sum(t[..., 0].abs() ** 2 for t in tables).sqrt())

    def rotate(self, x: Tensor, positions: Tensor, layer: int = 0) -> Tensor:
        """x [B, H, T, D] before RoPE to after RoPE at positions [B, T], float32."""
        return self._turn(x.float(), *self.tables(positions.to(x.device), layer))

    def unrotate(self, x: Tensor, positions: Tensor, layer: int = 0) -> Tensor:
        """Invert :meth:`rotate`: the opposite angle, divided by the squared scaling, in float32."""
        *cos, sin = self.tables(positions.to(x.device), layer)
        back = self._turn(x.float(), *cos, -sin if cos else sin.conj())
        scale = self.scaling(layer)
        if scale == 1.0:
            return back
        rotated = self.pairs(layer)[0].flatten().to(x.device)
        back[..., rotated] /= scale**2
        return back

    def _turn(self, x: Tensor, *tables: Tensor) -> Tensor:
        return self._apply(x, x[:, :1], *tables)[0]

    def pairs(self, layer: int = 0) -> tuple[Tensor, Tensor]:
        """RoPE pairs ([L, 2] channels, [L] radians per token): channel i turns towards channel j. Found by rotating a basis."""
        device = self._device()
        basis = torch.eye(self.head_dim, device=device)[None, None]
        turned = self.rotate(basis, torch.ones(1, self.head_dim, dtype=torch.long, device=device), layer)[0, 0]
        first, second, angles = [], [], []
        for i in range(self.head_dim):
            row = turned[i].clone()
            row[i] = 0
            j = int(row.abs().argmax())
            if row[j] > 0:
                first.append(i), second.append(j), angles.append(torch.atan2(turned[i, j], turned[i, i]))
        return torch.tensor([first, second]).T, torch.stack(angles).cpu()

    def _device(self) -> torch.device:
        buffers = list(self.module.buffers())
        return buffers[0].device if buffers else torch.device("cpu")
