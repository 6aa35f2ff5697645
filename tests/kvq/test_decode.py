"""The decoder with device-side lengths gives the tokens and logits of `generate`, coded or not, and never asks the device for a value."""

import functools
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import DynamicCache

from kernels import backend
from kvq.calibrate import fit
from kvq.decode import CodesStep, Decoder, ExactStep, PagedStep
from kvq.errors import Refusal
from tests import quants
from tests.kvq.codecs import bind, generate, library, pad_left, tokens
from tests.kvq.test_paged_route import codecs

pytestmark = pytest.mark.skipif(not backend._installed(), reason="Triton is not installed here")
KINDS = {"blockgtq": ("blockgtq", 3, PagedStep), "gsrq": ("gsrq", 1, CodesStep), "fp16": (None, 16, ExactStep)}


def bound(kind: str, **options):
    name, bits, _ = KINDS[kind]
    make = vector_codecs if name == "gsrq" else name and codecs(name, bits)
    return bind("llama", make, memo=False, attention="fused", **options) if make else bind("llama")


@functools.cache
def vector_codecs(model, beam=1):
    node = quants.load("gsrq", 1, quick={**quants.QUICK, "entries": 256, "beam": beam})
    return fit(model, [tokens(1, 300, seed=7)[0]], *(quants.maker(node, kind, 0) for kind in ("key", "value")), seed=0, memory_gb=1)


@torch.inference_mode()
def prefilled(lm, ids, mask, exact=False):
    cache = DynamicCache(config=lm.model.config) if exact else lm.new_cache()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = lm.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
    return cache, logits.argmax(-1, keepdim=True)


@pytest.mark.parametrize("kind,pads", [("blockgtq", [0, 6]), ("gsrq", [0, 6]), ("fp16", [0, 0])], ids=str)
def test_steps_equal_generate(kind, pads):
    ids, mask = pad_left(tokens(2, 31), pads)
    lm = bound(kind)
    expected = library(lm, ids, mask, steps=3) if kind == "fp16" else generate(lm, ids, mask, steps=3)
    cache, token = prefilled(lm, ids, mask, exact=kind == "fp16")
    decoder = Decoder(lm.model, cache, token, steps=2)
    assert all(type(layer) is KINDS[kind][2] for layer in decoder.cache.layers)
    assert torch.equal(token, expected.tokens[:, :1])
    for t in range(1, 3):
        logits = decoder.step()
        torch.testing.assert_close(logits, expected.logits[:, t], atol=1e-2 if kind != "fp16" else 1e-4, rtol=0)
        assert torch.equal(decoder.ids, expected.tokens[:, t : t + 1])
    with pytest.raises(Refusal, match="more steps"):
        decoder.step()


@pytest.mark.parametrize("architecture,beam", [("llama", 1), ("llama_yarn", 1), ("llama", 2)])
def test_appended_codes_are_those_of_the_codec(architecture, beam):
    """One launch, or the codec itself where it searches with a beam, writes what the cache of `generate` holds: same positions, same scaling, nothing beside."""
    ids, mask = pad_left(tokens(2, 31), [0, 6])
    lm = bind(architecture, functools.partial(vector_codecs, beam=beam), memo=False, attention="fused")
    expected = generate(lm, ids, mask, steps=4)
    decoder = Decoder(lm.model, *prefilled(lm, ids, mask), steps=4)
    assert all((layer.write is None) == (beam > 1) for layer in decoder.cache.layers)
    for t in range(1, 4):
        decoder.step()
        decoder.ids.copy_(expected.tokens[:, t : t + 1])
    for layer, right in zip(decoder.cache.layers, expected.cache.layers, strict=True):
        for held, stream in zip(layer.held, right.streams, strict=True):
            found, codes = held.buffers["codes"], stream.codes["codes"]
            assert found.shape[2] == 35 and codes.shape[2] == 34
            assert torch.equal(found[:, :, :31], codes[:, :, :31]) and not found[:, :, 34:].any()
            assert (found[:, :, 31:34] == codes[:, :, 31:34]).float().mean() > 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_a_still_decoder_repeats_its_step(kind):
    ids, mask = pad_left(tokens(1, 33), [0])
    lm = bound(kind)
    cache, token = prefilled(lm, ids, mask, exact=kind == "fp16")
    decoder = Decoder(lm.model, cache, token, steps=1, still=True)
    first = decoder.step().clone()
    decoder.ids.copy_(token)
    assert torch.equal(decoder.step(), first) and decoder.progress.lengths.tolist() == [33]


class NoReading(TorchDispatchMode):
    """Raises where the host would wait for a value or a size of the device, or send it one (`lift_fresh`: torch.tensor)."""

    FORBIDDEN = (
        "aten._local_scalar_dense",
        "aten.nonzero",
        "aten.item",
        "aten.is_nonzero",
        "aten.equal",
        "aten.masked_select",
        "aten.unique",
        "aten._unique2",
        "aten.allclose",
        "aten.lift_fresh",
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith(self.FORBIDDEN):
            raise AssertionError(f"{function} reads back to the host, or copies from it")
        return function(*args, **(kwargs or {}))


@contextmanager
def on_device(monkeypatch):
    """What a capturing stream would refuse raises; kernels run as on a device, apart from what their interpreter does."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def apart(self, *args, **kwargs):
        with _disable_current_modes():
            monkeypatch.undo()
            try:
                return launch(self, *args, **kwargs)
            finally:
                forbid()

    def forbid():
        monkeypatch.setattr(GridExecutor, "__call__", apart)
        for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            monkeypatch.setattr(torch.Tensor, name, refuse(name))

    def refuse(name):
        def raising(self, *args, **kwargs):
            raise AssertionError(f"Tensor.{name} reads back to the host")

        return raising

    forbid()
    with NoReading():
        yield
    monkeypatch.undo()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_nothing_back(kind, monkeypatch):
    ids, mask = pad_left(tokens(2, 20), [0, 0])
    lm = bound(kind)
    decoder = Decoder(lm.model, *prefilled(lm, ids, mask, exact=kind == "fp16"), steps=4)
    decoder.step()  # tables are made once, as the warm steps before a capture make them
    kept = {name: x.data_ptr() for name, x in buffers(decoder).items()}
    with on_device(monkeypatch), torch.inference_mode():
        decoder._step()
    assert {name: x.data_ptr() for name, x in buffers(decoder).items()} == kept, "a graph reads where its buffers were"


def buffers(decoder) -> dict[str, torch.Tensor]:
    found = {"ids": decoder.ids, "open": decoder.open, **{n: x for n, x in vars(decoder.progress).items() if isinstance(x, torch.Tensor)}}
    for layer in decoder.cache.layers:
        for i, held in enumerate(getattr(layer, "held", [])):
            leaves = {"words": held.words, "sides": held.sides} if isinstance(layer, PagedStep) else held.buffers
            found |= {f"{layer.index} {i} {name}": x for name, x in leaves.items()}
        if isinstance(layer, ExactStep):
            found |= {f"{id(layer)} key": layer.keys, f"{id(layer)} value": layer.values}
    return found


def test_the_guard_sees_a_read():
    with pytest.raises(AssertionError, match="reads back"), NoReading():
        torch.ones(3).sum().item()


def test_a_step_makes_no_mask():
    from transformers import AttentionMaskInterface

    ids, mask = pad_left(tokens(1, 20), [0])
    lm = bound("fp16")
    decoder = Decoder(lm.model, *prefilled(lm, ids, mask, exact=True), steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AttentionMaskInterface._global_mapping, "kvq", lambda *a, **k: pytest.fail("a mask of the whole length was made"))
        decoder.step()


@pytest.mark.parametrize("options,reason", [({"window": 4}, "exact"), ({"attention": "reference"}, "kernel")])
def test_caches_that_cannot_be_taken_over(options, reason):
    ids, mask = pad_left(tokens(1, 12), [0])
    lm = bind("llama", codecs("tq_mse", 2), memo=False, **{"attention": "fused", **options})
    with pytest.raises(Refusal, match=reason):
        Decoder(lm.model, *prefilled(lm, ids, mask), steps=2)


def test_a_graph_of_one_length_is_refused_for_decoding():
    ids, mask = pad_left(tokens(1, 12), [0])
    lm = bound("gsrq")
    with pytest.raises(Refusal, match="still=True"):
        Decoder(lm.model, *prefilled(lm, ids, mask), steps=2).capture()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["blockgtq"])
def test_a_graph_decodes_as_steps_do(kind):
    from kvq import tiny
    from kvq.models import LM

    model, tokenizer = tiny.load("llama", "float16", "cuda")
    name, bits, _ = KINDS[kind]
    lm = LM(model, tokenizer, "llama", codecs(name, bits)(model), memo=False, attention="fused")
    ids, mask = (x.cuda() for x in pad_left(tokens(2, 31), [0, 6]))
    expected = generate(lm, ids, mask, steps=9)
    decoder = Decoder(model, *prefilled(lm, ids, mask), steps=8)
    decoder.capture()
    for t in range(1, 9):
        torch.testing.assert_close(decoder.step(), expected.logits[:, t], atol=3e-2, rtol=0, check_dtype=False)
        decoder.ids.copy_(expected.tokens[:, t : t + 1])
