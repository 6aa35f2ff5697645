"""Every architecture in miniature under every quantizer of conf/quant: it runs with everything encoded, or says why not."""

import functools

import pytest
import torch

from kvq import calibrate, tiny
from kvq.errors import Refusal
from kvq.models import LM
from tests import quants
from tests.kvq.codecs import generate, pad_left, tokens

SLIDING, LATENT = {"mistral"}, {"deepseek_v2"}
SAMPLES = list(tokens(2, 130))
BITS = (1, 2, 4)


@functools.cache
def model_of(architecture):
    return tiny.load(architecture, "float32", "cpu")


def bind(architecture: str, name: str) -> LM:
    """The quantizer fitted on the model, at the first of BITS that fits its heads."""
    model, tokenizer = model_of(architecture)
    for bits in BITS:
        node = quants.load(name, bits)
        try:
            codecs = calibrate.fit(model, SAMPLES[:1] if quants.pins_bits(name) else SAMPLES, *(quants.maker(node, k) for k in ("key", "value")), seed=0, memory_gb=1)
        except Refusal:
            raise
        except ValueError as error:
            reason = error
            continue
        return LM(model, tokenizer, architecture, codecs, sink=node["sink"], window=min(node["window"], 8))
    raise reason


def before_rope(name: str) -> bool:
    return quants.maker(quants.load(name, 2), "key")().space == "pre"


@pytest.mark.parametrize("name", quants.NAMES)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_it_runs_encoded_or_is_refused_by_layer_type(architecture, name):
    if architecture in SLIDING:
        with pytest.raises(Refusal, match="sliding_attention"):
            bind(architecture, name)
        return
    if architecture in LATENT and before_rope(name):
        with pytest.raises(Refusal, match="latent.*space=post"):
            bind(architecture, name)
        return
    lm = bind(architecture, name)
    if architecture in LATENT and not lm.batch_safe:
        lm.logits(tokens(1, 40))
        assert lm.usage()["encoded"] > 0
        with pytest.raises(Refusal, match="latent.*task.batch_size=1"):
            lm.logits(tokens(2, 40))
        return
    logits = lm.logits(tokens(2, 40))
    assert logits.isfinite().all()
    usage = lm.usage()
    held = usage["tokens"] - usage["encoded"]
    assert usage["tokens"] == 80 and 0 <= held < 2 * (8 + 32) and usage["encoded"] > 0 and usage["code_bytes"] > 0
    out = generate(lm, *pad_left(tokens(2, 44), [0, 6]), steps=3)
    report = out.cache.audit()
    assert out.logits.isfinite().all() and report["tokens"] == 2 * 46 - (0 if architecture in LATENT else 6) and report["encoded"] > 0


@pytest.mark.parametrize("architecture", [a for a in tiny.ARCHITECTURES if a not in SLIDING])
def test_the_canary_changes_a_single_forward(architecture):
    ids = tokens(2, 12)
    plain = model_of(architecture)[0](ids).logits
    zeroed, kept = (bind(architecture, name).logits(ids) for name in ("zero", "fp16"))
    assert (zeroed - plain).abs().max() > 1e-3
    assert (kept - plain).abs().max() < 1e-3 * (zeroed - plain).abs().max() + 1e-4


def test_seeds_and_weights_are_the_architectures_own():
    shapes = {name: sum(p.numel() for p in model_of(name)[0].parameters()) for name in tiny.ARCHITECTURES}
    assert len(set(shapes.values())) >= 6 and max(shapes.values()) < 2_000_000
    again = tiny.load.__wrapped__("llama", "float32", "cpu")[0]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model_of("llama")[0].parameters()))


def test_an_unknown_architecture_is_refused():
    with pytest.raises(Refusal, match="model.architecture=gpt9 is not one of llama"):
        tiny.load("gpt9")
