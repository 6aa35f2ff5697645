"""A whole model through the kernels: generation from packed pages equals generation from reconstructed keys and values."""

import functools

import pytest
import torch

from kernels import backend
from kernels.paged import fuse
from kvq.calibrate import fit
from kvq.stream import RaggedStream, Stream
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


@functools.cache
def fitted(name, bits):
    """The codecs of one layer."""
    return codecs(name, bits)(bind("llama").model)[0]


def fed(stream, x, chunks):
    for part in x.split(chunks, 2):
        stream.append(part)
    return stream


@pytest.mark.parametrize("chunks", [(84,), (37, 1, 40, 1, 5)], ids=str)
@pytest.mark.parametrize("index", [0, 1], ids=["keys", "values"])
@pytest.mark.parametrize("name,bits,sink,window", [("blockgtq", 3, 0, 0), ("blockgtq_plus", 3, 3, 5), ("tq_mse", 2, 1, 40)], ids=str)
def test_streams_hand_tokens_to_the_kernel(name, bits, sink, window, index, chunks, monkeypatch):
    """The codec codes nothing itself; what is held are its codes, up to values beside a threshold, in as many bytes. So for left-padded rows."""
    fused = fuse(*fitted(name, bits))
    codec, spec, count = fitted(name, bits)[index], fused.specs[index], 84 - sink - window
    x = torch.randn(2, spec.heads, 84, spec.dim, generator=torch.Generator().manual_seed(index))
    packed = fused.held(index)
    packed.append(codec.encode(x[:, :, sink : sink + count]))
    if backend.use_triton(x):
        monkeypatch.setattr(codec, "encode", lambda x: pytest.fail("the codec was asked"))
    make = lambda: Stream(codec, sink, window, memo=False, held=fused.held(index))  # noqa: E731
    ours, ragged = (fed(stream, x, chunks) for stream in (make(), RaggedStream(make, [0, 20])))
    assert ours.encoded == ours.held.tokens == count and ours.exact == sink + window
    assert ours.bytes()[0] == packed.bytes() and ours.bytes()[2] == x[:, :, :count].numel()
    codes, gains = packed.symbols()
    for held, row, b, skip in ((ours.held, 0, 0, 0), (ours.held, 1, 1, 0), (ragged.rows[0].held, 0, 0, 0), (ragged.rows[1].held, 0, 1, 20)):
        found, sides = (part[row] for part in held.symbols())
        assert held.tokens == count - skip
        distance = (found - codes[b, :, skip:]).abs()
        assert distance.max() <= 1 and distance.float().mean() <= 1e-3
        torch.testing.assert_close(sides.float(), gains[b, :, skip:].float(), rtol=2e-3, atol=1.0 if spec.log8 else 1e-3)


def test_kernels_serve_the_shipped_quantizers():
    """Which files of conf/quant have a kernel at 3 bits; a file that loses or gains one changes this list."""
    served = []
    for name in quants.NAMES:
        try:
            pair = [quants.maker(quants.load(name, None if quants.pins_bits(name) else 3), kind, 0)() for kind in ("key", "value")]
        except ValueError:
            continue
        served += [name] if all(hasattr(codec, "paged") for codec in pair) else []
    assert served == ["blockgtq", "blockgtq_plus", "blockgtq_tiles", "fp8", "int4", "int8", "kivi", "tq_mse"]
