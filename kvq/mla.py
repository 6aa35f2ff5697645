"""Multi-head latent attention (DeepSeek-V2 and V3): the rotary key is coded, the latent is kept exact and counted.

The cache slots change their meaning: `key_states` is the latent [B, 1, T, kv_lora_rank] without RoPE, `value_states` the rotary key
[B, 1, T, qk_rope_head_dim] that all heads share. The model expands the latent right after `update`, so tensors are returned, no
handles; the key codec codes the rotary key after RoPE and the value codec has nothing to code.
"""

from torch import Tensor

from kvq.errors import Refusal
from kvq.layer import QuantizedLayer
from kvq.stream import Stream

EVERYTHING = 1 << 62


class LatentLayer(QuantizedLayer):
    """One layer of latents and rotary keys; `update` encodes at once and returns (latent, decoded rotary key)."""

    coded = slice(0, 1)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take latents and rotary keys [B, 1, T, .]. Raises Refusal on other slots and where padding could enter a group or sink."""
        latent, rotary = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(latent, rotary)
        if latent.shape[1] != 1 or rotary.shape[1] != 1:
            raise Refusal(f"Layer {self.index} caches {latent.shape[1]} heads, not one latent and one rotary key; this attention is not supported.")
        if not self.streams:
            self._open(rotary, latent, None)
        self.count += latent.shape[2]
        rotary, latent = self._store(rotary, latent, None, latent.shape[2])
        return latent, rotary

    def _open(self, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        codec = self.codecs[0]
        # The mask never comes here, so padding cannot be told from tokens.
        if key.shape[0] > 1 and (self.sink or codec.block > 1 or getattr(codec, "stateful", False)):
            raise Refusal("With multi-head latent attention, sinks, token groups and running statistics need batches of one row; set task.batch_size=1.")
        self.cell = key.shape[3] + value.shape[3]
        self.pads = [0] * key.shape[0]
        self.streams = [Stream(codec, self.sink, self.window, self.memo), Stream(codec, 0, EVERYTHING, memo=False)]
