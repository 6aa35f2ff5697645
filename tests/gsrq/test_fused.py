"""Generation that reads packed GSRQ codes says what generation over reconstructions says; pairs that no kernel serves are named."""

import functools

import pytest
import torch

from gsrq import GSRQ
from gsrq.gskm import gskm
from kvq import calibrate, tiny
from kvq.errors import Refusal
from kvq.layer import fuse
from tests.kvq.codecs import NEAR, bind, generate, pad_left, tokens

QUICK = functools.partial(gskm, rounds=3)


@functools.cache
def fitted(architecture, space="pre", bits=1.0, piece=16, entries=256):
    model, _ = tiny.load(architecture, "float32", "cpu")
    samples = list(tokens(6, 64))
    options = {"bits": bits, "piece": piece, "entries": entries, "cluster": QUICK}
    return calibrate.fit(model, samples, lambda: GSRQ(**options, space=space), lambda: GSRQ(**options), seed=0, memory_gb=1)


@pytest.mark.parametrize("architecture, space", [("llama", "pre"), ("llama", "post"), ("llama31", "pre"), ("llama_yarn", "pre"), ("qwen25", "pre")])
@pytest.mark.parametrize("held", [{}, {"sink": 3, "window": 5}], ids=str)
def test_codes_say_what_reconstructions_say(architecture, space, held):
    pairs = fitted(architecture, space)
    ids, mask = pad_left(tokens(2, 20), [0, 5])
    outs = [generate(bind(architecture, lambda _: pairs, attention=how, memo=False, **held), ids, mask, steps=10) for how in ("fused", "reference")]
    assert torch.equal(outs[0].tokens, outs[1].tokens)
    torch.testing.assert_close(outs[0].logits, outs[1].logits, **NEAR)
    assert outs[0].cache.audit() == outs[1].cache.audit()


def test_a_restored_codec_still_knows_its_rotation():
    key, value = fitted("llama")[0]
    twin = GSRQ(1.0, piece=16, cluster=QUICK)
    for name, buffer in key.named_buffers():
        twin.register_buffer(name, buffer)
    assert twin.fuse(value) is not None and torch.equal(twin.inv_freq, key.inv_freq)
    finer = GSRQ(0.5, piece=16, cluster=QUICK)
    assert finer.adopt(dict(key.named_buffers())) and torch.equal(finer.inv_freq, key.inv_freq)


def test_what_no_kernel_serves_is_refused():
    _, value = fitted("llama")[0]
    nibbles = fitted("llama", entries=16)[0]
    for pair in (nibbles, fitted("glm4")[0]):  # GLM turns half the channels of a head
        with pytest.raises(Refusal, match="attention=reference"):
            fuse(*pair)
    assert value.fuse(torch.nn.Identity()) is None
