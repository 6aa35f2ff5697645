"""The transformers adapter: a cache whose layers hold codes, and the attention function that reads them.

With `kvq.layer` and `kvq.mla` the only place that knows transformers' cache and attention interfaces (5.17 to 5.23). `update` hands out an opaque handle; the
attention function registered as "kvq" receives it together with the queries' positions, undoes RoPE where a codec wants keys before
it, encodes, reconstructs everything and calls transformers' own SDPA. So a single forward already sees the loss, each token is
encoded once, and an ordinary DynamicCache works under the same attention name.
"""

import copy

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvq.errors import Refusal
from kvq.layer import ATTENTIONS, Handle, QuantizedLayer
from kvq.mla import LatentLayer

ATTENTION = "kvq"
IGNORED_KEYWORDS = {"use_cache", "output_router_logits", "output_attentions", "output_hidden_states", "return_dict", "is_causal", "cache_position"}
PREFILLS = ("quantized", "exact")


def attention(module, query, key, value, attention_mask, *, scaling=None, dropout=0.0, position_ids=None, watch=None, **kwargs):
    """Attention over handles (codes) or plain tensors. Raises Refusal on a keyword that would change the result.

    watch: called with (layer index, query) by recordings of models that do not pass handles.
    """
    if watch is not None:
        watch(module.layer_idx, query)
    if isinstance(key, Handle):
        for name, given in kwargs.items():
            if given is not None and name not in IGNORED_KEYWORDS:
                raise Refusal(f"The attention keyword '{name}' of {type(module).__name__} is not supported with a quantized cache.")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if key.layer.reads_codes(query):
            return key.layer.decode(query, position_ids, scale), None
        if key.layer.reads_chunks():
            return key.layer.attend_chunk(query, attention_mask, scale), None
        key, value = key.layer.attend(query, attention_mask, position_ids)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class QuantizedCache(Cache):
    """A fresh cache for one call: quantized layers where the model attends to everything, the library's classes elsewhere.

    codecs: one (key codec, value codec) pair per decoder layer. `prefill="quantized"` lets the prompt see reconstructed keys and
    values, its own included; `"exact"` attends in full precision while more than one query arrives (KIVI's protocol) and stores codes.
    attention: `"reference"` reconstructs and calls SDPA; `"fused"` reads packed codes with the pair's kernel when one query arrives (a
    chunk as well, where the kernel serves chunks) and raises Refusal where there is none; `"auto"` is the reference, so that a score does not depend on the machine.
    """

    def __init__(self, config, codecs, rope=None, *, sink: int = 0, window: int = 0, prefill: str = "quantized", memo: bool = True, attention: str = "reference"):
        if attention == "fused" and is_latent(config):
            raise Refusal("attention=fused: no kernel reads latents and rotary keys from packed codes; use attention=reference.")
        if attention not in ATTENTIONS:
            raise Refusal(f"attention={attention} is not one of {', '.join(ATTENTIONS)}.")
        if prefill not in PREFILLS:
            raise Refusal(f"prefill={prefill} is not one of {', '.join(PREFILLS)}.")
        layers, layer_class = [], LatentLayer if is_latent(config) else QuantizedLayer
        for index, (kind, kwargs) in enumerate(layer_kinds(config)):
            if kind == "full_attention":
                held = {"sink": sink, "window": window, "prefill": prefill, "memo": memo, "rope": rope, "index": index}
                layers.append(layer_class(*codecs[index], **held, attention=attention))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs))
        super().__init__(layers=layers)

    @property
    def quantized_layers(self) -> list[QuantizedLayer]:
        return [layer for layer in self.layers if isinstance(layer, QuantizedLayer)]

    def fork(self, rows: int) -> "QuantizedCache":
        """This cache of one row as a cache of `rows` equal rows; what is appended to either does not reach the other."""
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        for layer in twin.layers:
            layer.batch_select_indices(torch.zeros(rows, dtype=torch.long))
        return twin

    def audit(self) -> dict[str, int]:
        """Totals over layers: tokens and encoded (the smallest of any layer), bytes of codes, exact tokens and unquantized layers.

        Raises RuntimeError if any layer lost or repeated a token, or if nothing was cached.
        """
        reports = [layer.audit() for layer in self.quantized_layers if layer.streams]
        if len(reports) != len(self.quantized_layers):
            raise RuntimeError("Some quantized layers never saw a token: the model did not use the cache that it was given; the run is not valid.")
        total = {name: sum(r[name] for r in reports) for name in reports[0]}
        total["tokens"], total["encoded"] = reports[0]["tokens"], min(r["encoded"] for r in reports)
        for layer in self.layers:
            if not isinstance(layer, QuantizedLayer) and layer.is_initialized and layer.keys is not None:
                total["exact_bytes"] += sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
                total["slot_values"] += layer.keys.numel() + layer.values.numel()
        return total


def is_latent(config) -> bool:
    """Whether the model caches a latent and a rotary key instead of keys and values (multi-head latent attention)."""
    return bool(getattr(config.get_text_config(decoder=True), "kv_lora_rank", None))


def coded_shapes(config) -> dict[str, tuple[int, int]]:
    """(heads, head_dim) of what each codec codes, by kind: key and value, or the rotary key alone."""
    text = config.get_text_config(decoder=True)
    if is_latent(config):
        return {"key": (1, text.qk_rope_head_dim)}
    shape = text.num_key_value_heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {"key": shape, "value": shape}


def layer_kinds(config) -> list[tuple[str, dict]]:
    """(layer type, kwargs of the library's cache layer) per decoder layer; raises Refusal if there is nothing to quantize."""
    text = config.get_text_config(decoder=True)
    kinds, kwargs = get_layer_types_and_kwargs(text)
    kwargs = kwargs if isinstance(kwargs, list) else [kwargs] * len(kinds)
    if len(kinds) != text.num_hidden_layers:
        raise Refusal(f"{text.model_type} shares caches between layers ({len(kinds)} caches for {text.num_hidden_layers} layers); not supported.")
    if "full_attention" not in kinds:
        raise Refusal(
            f"Nothing to quantize in {text.model_type}: its layers are all of type {', '.join(sorted(set(kinds)))}. "
            "If contexts stay below the sliding window, set model.config.sliding_window=null."
        )
    return list(zip(kinds, kwargs))
