"""Recording keys, values, queries and their gradients on calibration text, through the same attention interface as the cache.

A recording layer hands out handles like a quantized one; the attention function calls `attend`, which notes what passes and returns
it unchanged. So the statistics are those of the tensors that a codec will see, on any model the cache can serve.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

from kvq.cache import is_latent, layer_kinds
from kvq.layer import QuantizedLayer
from kvq.rope import Rope


class RecordingLayer(QuantizedLayer):
    """Keeps the last keys, values and queries (after RoPE) and, if asked, hooks their gradients; with `rope`, those of keys before RoPE."""

    def __init__(self, groups: tuple[int | None, int | None], rope: Rope | None, index: int, wanted: bool):
        super().__init__(_Nothing(), _Nothing(), sink=0, window=0, prefill="quantized", memo=False, rope=rope, index=index)
        self.groups, self.grads, self.wanted = groups, [None, None], wanted

    def attend(self, query: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        key, value = self._pending
        self._pending = None
        if not self.wanted:  # other layers only let the forward pass: their activations must not add up
            return key, value
        self.seen = (key.detach(), value.detach(), query.detach())
        self.positions = position_ids.expand(key.shape[0], -1)
        for which, (x, group) in enumerate(zip((key, value), self.groups)):
            if group:
                x.register_hook(lambda grad, which=which, group=group: self._note(which, group, grad))
        return key, value

    def _note(self, which: int, group: int, grad: Tensor) -> None:
        """Squared gradient per token and group of channels, heads concatenated: [B * T, H * D // group]."""
        if which == 0 and self.rope is not None and group < grad.shape[-1]:
            grad = self.rope.unrotate(grad, self.positions, self.index) * self.rope.scaling(self.index) ** 2
        squared = grad.float().pow(2).transpose(1, 2).flatten(2)
        self.grads[which] = squared.unflatten(-1, (-1, group)).sum(-1).flatten(0, 1).cpu()


class RecordingLatentLayer(RecordingLayer):
    """The same for multi-head latent attention: its rotary keys, and of the queries the channels that meet them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        batch, _, length, _ = value_states.shape
        self._pending = (value_states, key_states[..., :0])
        self.attend(value_states[:, :, :0], None, torch.arange(length, device=value_states.device).expand(batch, -1))
        return key_states, value_states

    def watch(self, query: Tensor) -> None:
        if not self.wanted:
            return
        rotary, nothing, _ = self.seen
        self.seen = (rotary, nothing, query[..., -rotary.shape[3] :].detach())


class _Nothing(nn.Module):
    block, space, bits, grad_group = 1, "post", 0.0, None


def record(model, samples: list[Tensor], layers: range, groups, rope: Rope | None, batch_size: int = 1) -> Iterator[list[RecordingLayer]]:
    """One forward (and one backward of each sample's mean next-token loss, if any group is set) per batch of samples [T].

    Yields the recording layers of `layers` after each batch. groups: (key, value) gradient group per layer index; rope: given if
    the gradients of keys are wanted before RoPE. What is recorded of a sample does not depend on the batch it is in.
    """
    kinds, latent = layer_kinds(model.config), is_latent(model.config)
    layer_class = RecordingLatentLayer if latent else RecordingLayer
    needs_grad = any(g for layer in layers for g in groups[layer])
    for start in range(0, len(samples), batch_size):
        ids = torch.stack(samples[start : start + batch_size]).to(model.device)
        slots = []
        for index, (kind, kwargs) in enumerate(kinds):
            if kind == "full_attention":
                slots.append(layer_class(groups[index], rope, index, index in layers))
            else:
                slots.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs))
        positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        with torch.set_grad_enabled(needs_grad):
            embeds = model.get_input_embeddings()(ids).detach().requires_grad_(needs_grad)
            watch = {"watch": lambda index, query, slots=slots: slots[index].watch(query)} if latent else {}
            logits = model(inputs_embeds=embeds, position_ids=positions, past_key_values=Cache(layers=slots), **watch).logits
            if needs_grad:
                loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum") / (ids.shape[1] - 1)
                torch.autograd.grad(loss, embeds)
        yield [slots[index] for index in layers if isinstance(slots[index], RecordingLayer)]
