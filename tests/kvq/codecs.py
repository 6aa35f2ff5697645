"""Codecs and models for the tests of the harness: a visibly lossy codec of every kind, an exact one, and a counting one."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvq import tiny
from kvq.models import LM

NEAR = {"atol": 3e-5, "rtol": 0}
"""fp32 rounding on the tiny models, whose lossy codec moves logits by more than FAR."""
FAR = 1e-3


class Lossy(nn.Module):
    """Seven levels per value, scaled by the largest magnitude of a block of tokens or, if stateful, of the stream so far."""

    bits, grad_group = 8.0, None

    def __init__(self, block: int = 1, space: str = "post", stateful: bool = False):
        super().__init__()
        self.block, self.space, self.stateful = block, space, stateful

    def fit(self, calibration):
        return self

    def encode(self, x: Tensor, state: dict | None = None) -> dict[str, Tensor]:
        blocks = x.float().unflatten(2, (-1, self.block))  # [B, H, G, block, D]
        peaks = blocks.abs().amax((3, 4), keepdim=True)
        if self.stateful:
            peaks = torch.cat([state["peak"], peaks], dim=2) if "peak" in state else peaks
            peaks = peaks.cummax(2).values
            state["peak"] = peaks[:, :, -1:]
            peaks = peaks[:, :, -blocks.shape[2] :]
        peaks = peaks.clamp_min(1e-9)
        return {"codes": (blocks / peaks * 3).round().to(torch.int8), "peak": peaks}

    def decode(self, codes: dict[str, Tensor]) -> Tensor:
        return (codes["codes"].float() / 3 * codes["peak"]).flatten(2, 3)


class Exact(nn.Module):
    """Keeps what it is given, in its own dtype."""

    bits, block, grad_group = 16.0, 1, None

    def __init__(self, space: str = "post"):
        super().__init__()
        self.space = space

    def fit(self, calibration):
        return self

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x}

    def decode(self, codes: dict[str, Tensor]) -> Tensor:
        return codes["x"].float()


class Spy(Lossy):
    """Notes every tensor that it encodes."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen: list[Tensor] = []

    def encode(self, x: Tensor, state: dict | None = None) -> dict[str, Tensor]:
        self.seen.append(x.clone())
        return super().encode(x, state)


def pairs(model, make_key=Lossy, make_value=None) -> list[tuple]:
    """One (key, value) pair of new codecs per layer; values are never coded before RoPE."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return [(make_key(), (make_value or make_key)()) for _ in range(layers)]


def lossy_pairs(model, **options) -> list[tuple]:
    return pairs(model, lambda: Lossy(**options), lambda: Lossy(**{**options, "space": "post"}))


def bind(architecture: str = "llama", codecs=None, dtype: str = "float32", **options) -> LM:
    """An LM over a tiny model with the given codecs (or a function of the model that makes them)."""
    model, tokenizer = tiny.load(architecture, dtype, "cpu")
    codecs = codecs(model) if callable(codecs) else codecs
    return LM(model, tokenizer, architecture, codecs if codecs is not None else lossy_pairs(model), **options)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def pad_left(ids: Tensor, pads: list[int], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows ids[b, pads[b]:] moved to the right edge; (ids, mask)."""
    mask = torch.arange(ids.shape[1])[None] >= torch.tensor(pads)[:, None]
    return torch.where(mask, ids, pad), mask.long()


@torch.inference_mode()
def generate(lm: LM, ids: Tensor, mask: Tensor | None = None, steps: int = 6, cache=None, **options) -> SimpleNamespace:
    """Greedy generation with its logits [B, steps, V] and the cache that was used; `steps` tokens whatever the model says."""
    cache = cache or lm.new_cache()
    mask = torch.ones_like(ids) if mask is None else mask
    out = lm.model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=steps, min_new_tokens=steps, pad_token_id=0,
        **{"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **options},
    )  # fmt: skip
    logits = torch.stack(out.logits, dim=1) if out.get("logits") is not None else None
    return SimpleNamespace(tokens=out.sequences[:, ids.shape[1] :], logits=logits, cache=cache)


@torch.inference_mode()
def forced(lm: LM, ids: Tensor, chunks: list[int], cache=None) -> Tensor:
    """Logits [B, T, V] of given tokens fed in chunks of these sizes."""
    cache = cache if cache is not None else lm.new_cache()
    parts, start = [], 0
    for size in chunks:
        positions = torch.arange(start, start + size).expand(ids.shape[0], -1)
        parts.append(lm.model(ids[:, start : start + size], position_ids=positions, past_key_values=cache).logits)
        start += size
    return torch.cat(parts, dim=1)


def lossy(options: dict, held: dict, architecture: str = "llama", **more) -> LM:
    """A tiny model under Lossy(**options) with sink and window from `held`."""
    return bind(architecture, lambda model: lossy_pairs(model, **options), **held, **more)


def library(lm: LM, ids: Tensor, mask: Tensor | None = None, **options) -> SimpleNamespace:
    """The same generation over transformers' own cache."""
    return generate(lm, ids, mask, cache=DynamicCache(config=lm.model.config), **options)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
