"""A whole model through the kernels: generation from packed pages equals generation from reconstructed keys and values."""

import pytest
import torch

from kernels import backend
from kvq.calibrate import fit
from tests import quants
from tests.kvq.codecs import bind, generate, pad_left, tokens

pytestmark = pytest.mark.skipif(not backend._installed(), reason="Triton is not installed here")


def codecs(name, bits):
    node = quants.load(name, bits)
    samples = [tokens(1, 200, seed=7)[0]]
    return lambda model: fit(model, samples, *(quants.maker(node, kind, 0) for kind in ("key", "value")), seed=0, memory_gb=1)


@pytest.mark.parametrize("name,bits,held", [("blockgtq_plus", 3, {}), ("tq_mse", 2, {"sink": 2, "window": 5}), ("int4", None, {})], ids=str)
def test_generation_from_pages(name, bits, held):
    make, (ids, mask) = codecs(name, bits), pad_left(tokens(2, 31), [0, 7])
    ours, theirs = (generate(bind("llama", make, memo=False, attention=how, **held), ids, mask, steps=4) for how in ("fused", "reference"))
    torch.testing.assert_close(ours.logits, theirs.logits, atol=2e-2, rtol=0)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert ours.cache.audit()["encoded"] == theirs.cache.audit()["encoded"] > 0


def test_kernels_serve_the_shipped_quantizers():
    """Which files of conf/quant have a kernel at 3 bits; a file that loses or gains one changes this list."""
    served = []
    for name in quants.NAMES:
        try:
            pair = [quants.maker(quants.load(name, None if quants.pins_bits(name) else 3), kind, 0)() for kind in ("key", "value")]
        except ValueError:
            continue
        served += [name] if all(hasattr(codec, "paged") for codec in pair) else []
    assert served == ["blockgtq", "blockgtq_plus", "fp8", "int4", "int8", "kivi", "tq_mse"]
