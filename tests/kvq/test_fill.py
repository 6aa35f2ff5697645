"""A cache filled by repetition has the bytes, the positions and the audit of one that was read."""

import pytest
import torch

from kernels import backend, synthetic
from kernels.pages import PAGE
from kvq import fill
from kvq.errors import Refusal
from tests.kvq.codecs import bind, lossy
from tests.kvq.test_decode import vector_codecs
from tests.kvq.test_paged_route import codecs


@torch.inference_mode()
def read(lm, batch, tokens):
    cache = fill.fresh(lm)
    ids = fill.random_ids(lm, batch, tokens)
    lm.model(ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("tokens", [40, 256, 515, 1024])
def test_audit_equals_that_of_a_read_cache(tokens):
    lm = bind("llama", vector_codecs, attention="fused", memo=False)
    ours, theirs = fill.coded(lm, 2, tokens), read(lm, 2, tokens)
    assert ours.audit() == theirs.audit() and ours.get_seq_length() == tokens
    for layer in ours.quantized_layers:
        assert torch.equal(layer.streams[0].positions, torch.arange(tokens).expand(2, -1))
        codes = layer.streams[1].codes["codes"]
        assert torch.equal(codes, codes[:, :, torch.arange(tokens) % min(tokens, fill.READ)])


@pytest.mark.skipif(not backend._installed(), reason="Triton is not installed here")
def test_pages_are_repeated_whole(monkeypatch):
    monkeypatch.setattr(fill, "READ", 2 * PAGE)
    lm = bind("llama", codecs("tq_mse", 2), attention="fused", memo=False)
    short, cache = fill.coded(lm, 1, 64), fill.coded(lm, 1, 150)
    held = cache.layers[0].streams[0].held
    symbols, sides = held.symbols()
    assert symbols.shape[2] == 150 and torch.equal(symbols[:, :, 64:128], symbols[:, :, :64]) and torch.equal(sides[..., 128:], sides[..., :22])
    assert cache.audit()["tokens"] == 150 and cache.audit()["code_bytes"] * 2 == short.audit()["code_bytes"] * 5, "five pages begun"
    assert held.words.shape[2] == 5 + 1, "room for a token, and not for as many again"


def test_pages_begun_are_refused():
    held = synthetic.pages(synthetic.spec(1, 16, 2), 1, 40)
    with pytest.raises(ValueError, match="last page"):
        synthetic.repeat(held, 100)


def test_a_window_stays_as_it_is_and_groups_stay_whole():
    lm = lossy({"block": 4}, {"sink": 4, "window": 8})
    cache = fill.coded(lm, 1, 512)
    assert cache.audit()["tokens"] == 512 and all(stream.exact == 12 for stream in cache.layers[0].streams)
    with pytest.raises(Refusal, match="groups of 4"):
        fill.coded(lm, 1, 513)


def test_sliding_windows_cannot_be_filled():
    with pytest.raises(Refusal, match="full attention"):
        fill.coded(bind("gemma3"), 1, 300)


def test_the_exact_cache_is_transformers_own():
    lm = bind("llama")
    cache = fill.exact(lm.model, 3, 20)
    assert cache.layers[1].keys.shape == (3, 2, 20, 16) and cache.get_seq_length() == 20 and cache.layers[0].keys.std() > 0.5
