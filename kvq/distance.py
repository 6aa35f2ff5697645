"""How far from what it must equal lies what is to be timed: what is wrong is not timed."""

import copy

import torch
from torch import Tensor

from kernels.attention import attend
from kvq.cache import QuantizedCache
from kvq.compiled import Step
from kvq.decode import Decoder

LIMIT = 1e-2
"""Largest relative distance from the definition of what is timed, in float16."""
ROUNDINGS = 32
"""As the compiler rounds less often than the calls do, 36 layers end 6 (float16, bfloat16) units of rounding apart, and nearer to float32 than the calls."""


def of_kernels(lm, cache: QuantizedCache) -> float:
    """Relative distance of the kernels' attention of random queries, last layer and last row, from that of decoded keys and values."""
    layer, config = cache.quantized_layers[-1], lm.model.config.get_text_config(decoder=True)
    key, value = layer.streams
    rows, dim = len(layer.pads), key.tail.shape[-1]
    query = torch.randn(rows, config.num_attention_heads, dim, device=lm.device, dtype=lm.model.dtype)
    ours, _ = layer.fused.attend(query, key.held, value.held, key.length, scale=dim**-0.5, first=None, positions=key.positions)
    twins = [copy.copy(stream) for stream in (key, value)]
    for twin in twins:
        twin.select(torch.tensor([rows - 1]))
    theirs, _ = attend(query[-1:], *(twin.read() for twin in twins), dim**-0.5)
    return relative(ours[-1:], theirs)


def of_compiled(decoder: Decoder, step: Step) -> float:
    """Relative distance of the compiled step's logits from those of the same step call by call, of a decoder that stands still; `step` stays in it.

    Raises RuntimeError beyond ROUNDINGS of the model's number type.
    """
    ids = decoder.ids.clone()
    plain = decoder.step().clone()
    decoder.ids.copy_(ids)
    decoder.compiled = step
    compiled = decoder.step()
    decoder.ids.copy_(ids)
    limit = max(1e-4, ROUNDINGS * torch.finfo(plain.dtype).eps)
    return checked(relative(compiled, plain), "the compiled step's logits differ from those of the same step call by call", limit)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def checked(distance: float, problem: str, limit: float = LIMIT) -> float:
    """The distance. Raises RuntimeError beyond the limit."""
    if not distance <= limit:  # NaN as well
        raise RuntimeError(f"{problem} by {distance:.2g}, relative; what is wrong is not timed.")
    return distance
