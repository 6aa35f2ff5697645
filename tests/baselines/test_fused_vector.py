"""Generation that reads packed VQLLM and CQ codes says what generation over reconstructions says; what no kernel serves is refused."""

import functools

import pytest
import torch

from kvq import calibrate, tiny
from kvq.baselines.cq import CQ
from kvq.baselines.vqllm import VQLLM
from kvq.errors import Refusal
from kvq.layer import fuse
from tests.kvq.codecs import NEAR, bind, generate, pad_left, tokens

CODECS = {
    "vqllm": lambda kind: VQLLM(2, group=8, entries=256, strided=kind == "key", rounds=2, steps=2, batch=64, decay=0.9),
    "cq": lambda kind: CQ(1, coupled=None, code_bits=None, weights="uniform", rounds=3, tolerance=0.0),
}


@functools.cache
def fitted(architecture, name):
    model, _ = tiny.load(architecture, "float32", "cpu")
    return calibrate.fit(model, list(tokens(6, 64)), *(functools.partial(CODECS[name], kind) for kind in ("key", "value")), seed=0, memory_gb=1)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("architecture", ["llama", "qwen25"])
@pytest.mark.parametrize("held", [{}, {"sink": 3, "window": 5}], ids=str)
def test_codes_say_what_reconstructions_say(name, architecture, held):
    pairs = fitted(architecture, name)
    ids, mask = pad_left(tokens(2, 20), [0, 5])
    outs = [generate(bind(architecture, lambda _: pairs, attention=how, memo=False, **held), ids, mask, steps=10) for how in ("fused", "reference")]
    assert torch.equal(outs[0].tokens, outs[1].tokens)
    torch.testing.assert_close(outs[0].logits, outs[1].logits, **NEAR)
    assert outs[0].cache.audit() == outs[1].cache.audit()


@pytest.mark.parametrize("name", CODECS)
def test_what_no_kernel_serves_is_refused(name):
    with pytest.raises(Refusal, match="attention=reference"):  # GLM turns half the channels of a head
        bind("glm4", lambda _: fitted("glm4", name), attention="fused").new_cache()
    key, value = fitted("llama", name)[0]
    assert key.fuse(torch.nn.Identity()) is None
    if name == "vqllm":
        assert key.fuse(key) is None, "strided values"
    with pytest.raises(Refusal, match="attention=reference"):
        fuse(value, torch.nn.Identity())
