"""The decoder with device-side lengths gives the tokens and logits of `generate` through the same kernels."""

import pytest
import torch

from kernels import backend
from kvq.decode import Decoder
from kvq.errors import Refusal
from tests.kvq.codecs import bind, generate, pad_left, tokens
from tests.kvq.test_paged_route import codecs

pytestmark = pytest.mark.skipif(not backend._installed(), reason="Triton is not installed here")


@torch.inference_mode()
def prefilled(lm, ids, mask):
    cache = lm.new_cache()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = lm.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
    return cache, logits.argmax(-1, keepdim=True)


def test_steps_equal_generate():
    ids, mask = pad_left(tokens(2, 31), [0, 6])
    lm = bind("llama", codecs("blockgtq", 3), memo=False, attention="fused")
    expected = generate(lm, ids, mask, steps=3)
    cache, token = prefilled(lm, ids, mask)
    decoder = Decoder(lm.model, cache, token, steps=2)
    assert torch.equal(token, expected.tokens[:, :1])
    for t in range(1, 3):
        logits = decoder.step()
        torch.testing.assert_close(logits, expected.logits[:, t], atol=1e-2, rtol=0)
        assert torch.equal(decoder.ids, expected.tokens[:, t : t + 1])
    with pytest.raises(Refusal, match="more steps"):
        decoder.step()


@pytest.mark.parametrize("options,reason", [({"window": 4}, "exact"), ({"attention": "reference"}, "pages")])
def test_caches_that_cannot_be_taken_over(options, reason):
    ids, mask = pad_left(tokens(1, 12), [0])
    lm = bind("llama", codecs("tq_mse", 2), memo=False, **{"attention": "fused", **options})
    with pytest.raises(Refusal, match=reason):
        Decoder(lm.model, *prefilled(lm, ids, mask), steps=2)
