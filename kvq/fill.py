"""A cache of any length without reading a text of that length: a short one is read, its codes are repeated.

Addresses, bytes and layout are those of a long text, and codes have a text's distribution; what the model then says means nothing.
"""

import torch
from torch import Tensor
from transformers import DynamicCache

from kernels import synthetic
from kernels.pages import Pages
from kvq.cache import QuantizedCache, coded_shapes
from kvq.errors import Refusal
from kvq.layer import QuantizedLayer
from kvq.stream import Stream

READ = 256
"""Tokens that the model reads: whole pages."""


def random_ids(lm, batch: int, tokens: int) -> Tensor:
    """Token ids [B, T], the same in every call."""
    vocabulary = lm.model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(lm.device)


def fresh(lm) -> QuantizedCache:
    """An empty cache as `lm.new_cache` makes it, on nobody's account."""
    return QuantizedCache(lm.model.config, lm.codecs, lm.rope, **lm.options)


@torch.inference_mode()
def coded(lm, batch: int, tokens: int) -> QuantizedCache:
    """A cache of `lm` with `tokens` tokens in each of `batch` rows, which passes the audit of any other.

    Raises Refusal where its streams cannot be repeated.
    """
    cache = fresh(lm)
    lm.model(random_ids(lm, batch, min(tokens, READ)), past_key_values=cache, use_cache=True, logits_to_keep=1)
    if tokens > READ:
        for layer in cache.layers:
            if not isinstance(layer, QuantizedLayer) or not all(isinstance(stream, Stream) for stream in layer.streams):
                raise Refusal("Only layers of full attention can be filled by repetition; use a model without sliding windows.")
            for stream in layer.streams:
                _repeat(stream, tokens)
            layer.count, layer._raw = tokens, None
    return cache


def _repeat(stream: Stream, tokens: int) -> None:
    more, period = tokens - stream.length, stream.encoded
    if not period or more % stream.codec.block:
        raise Refusal(f"{tokens} tokens cannot be filled by repeating {period} coded ones in groups of {stream.codec.block}; choose task.context a multiple of {READ}.")
    if isinstance(stream.held, Pages):
        synthetic.repeat(stream.held, period + more)
    else:
        take = torch.arange(more // stream.codec.block, device=stream.tail.device) % (period // stream.codec.block)
        stream.held.append({name: leaf.index_select(2, take) for name, leaf in stream.codes.items()})
    stream.encoded += more
    stream.length += more
    if stream.positions is not None:
        stream.positions = torch.arange(tokens, device=stream.positions.device).expand(len(stream.positions), -1)


@torch.inference_mode()
def exact(model, batch: int, tokens: int) -> DynamicCache:
    """transformers' own cache with normal keys and values in the model's precision."""
    cache = DynamicCache(config=model.config)
    shape = coded_shapes(model.config)["key"]
    for index in range(len(cache.layers)):
        key, value = (torch.randn(batch, shape[0], tokens, shape[1], device=model.device, dtype=model.dtype) for _ in range(2))
        cache.update(key, value, index)
    return cache
