"""A compiled step gives the tokens and logits of `generate` for every kind of cache, from one graph for all, and never runs call by call instead."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import backend
from kvq.compiled import Step
from kvq.decode import Decoder
from tests.kvq.codecs import generate, library, pad_left, tokens
from tests.kvq.test_decode import KINDS, bound, prefilled
from tests.kvq.test_paged_route import codecs

pytestmark = pytest.mark.skipif(not backend._installed(), reason="Triton is not installed here")


def test_one_graph_steps_every_cache_as_generate_does():
    """On a CPU the compiler counts loops: at most 15 a layer beside the products, where 40 operations were."""
    step = None
    for kind in KINDS:
        lm = bound(kind)
        step = step or Step(lm.model)
        ids, mask = pad_left(tokens(2, 31), [0, 0])
        expected = library(lm, ids, mask, steps=3) if kind == "fp16" else generate(lm, ids, mask, steps=3)
        decoder = Decoder(lm.model, *prefilled(lm, ids, mask, exact=kind == "fp16"), steps=2)
        decoder.compiled = step
        for t in range(1, 3):
            with sdpa_kernel(SDPBackend.MATH):
                logits = decoder.step()
            torch.testing.assert_close(logits, expected.logits[:, t], atol=1e-2 if kind != "fp16" else 1e-4, rtol=0)
            assert torch.equal(decoder.ids, expected.tokens[:, t : t + 1])
    told = step.account()
    assert told["compiled/graphs"] == 1 and 0 < told["compiled/kernels"] <= 15 * 2 and told["compiled/seconds"] > 0
    with pytest.raises(torch._dynamo.exc.RecompileError), torch.inference_mode():
        step(decoder.cache.layers, decoder.ids, decoder.open, decoder.progress.begin().int())


def test_call_by_call_is_an_error(monkeypatch):
    lm = bound("fp16")
    ids, mask = pad_left(tokens(1, 12), [0])
    decoder = Decoder(lm.model, *prefilled(lm, ids, mask, exact=True), steps=2)
    decoder.compiled = Step(lm.model)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="call by call"):
        decoder.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_compiled_step_is_captured():
    from kvq import tiny
    from kvq.models import LM

    model, tokenizer = tiny.load("qwen25", "float16", "cuda")
    lm = LM(model, tokenizer, "qwen25", codecs("blockgtq", 3)(model), memo=False, attention="fused")
    ids, mask = (x.cuda() for x in pad_left(tokens(2, 31), [0, 6]))
    expected = generate(lm, ids, mask, steps=5)
    decoder = Decoder(model, *prefilled(lm, ids, mask), steps=4)
    decoder.compiled = Step(model)
    decoder.capture()
    for t in range(1, 5):
        torch.testing.assert_close(decoder.step(), expected.logits[:, t], atol=3e-2, rtol=0, check_dtype=False)
        decoder.ids.copy_(expected.tokens[:, t : t + 1])
    assert decoder.compiled.graphs == 1
