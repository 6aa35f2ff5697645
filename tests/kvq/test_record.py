"""Recorded activations and gradients are those a codec meets: checked against the library's cache and against plain autograd."""

import pytest
import torch
from transformers import DynamicCache

from kvq import calibrate, tiny
from kvq.errors import Refusal
from kvq.rope import Rope
from tests.kvq.codecs import Lossy, tokens

SAMPLES = list(tokens(3, 24))


class Curious(Lossy):
    """Keeps its calibration."""

    def __init__(self, space="post", group=None):
        super().__init__(space=space)
        self.grad_group = group

    def fit(self, calibration):
        self.calibration = calibration
        return self


def fitted(name="llama", space="post", group=None, samples=SAMPLES, memory_gb=1.0, **options):
    model, _ = tiny.load(name, "float32", "cpu")
    return model, calibrate.fit(model, samples, lambda: Curious(space, group), lambda: Curious("post", group), seed=3, memory_gb=memory_gb, **options)


@pytest.mark.parametrize("name", ["llama", "qwen3", "glm4", "gemma3"])
def test_keys_and_values_are_those_of_the_librarys_cache(name):
    model, codecs = fitted(name)
    caches = []
    for ids in SAMPLES:
        caches.append(DynamicCache(config=model.config))
        with torch.inference_mode():
            model(ids[None], past_key_values=caches[-1])
    for layer, pair in enumerate(codecs):
        if pair == (None, None):
            assert name == "gemma3" and layer == 0
            continue
        for codec, kind in zip(pair, ("keys", "values")):
            x = torch.cat([getattr(cache.layers[layer], kind)[0] for cache in caches], dim=1)
            torch.testing.assert_close(codec.calibration.x, x, atol=1e-6, rtol=1e-5)
            assert (codec.calibration.kind, codec.calibration.layer, codec.calibration.seed) == (kind[:-1], layer, 3)
    calibration = codecs[1][0].calibration
    assert calibration.queries.shape == (4, 72, calibration.x.shape[2]) and codecs[1][1].calibration.queries is None
    assert calibration.sample_length == 24 and calibration.positions.tolist() == list(range(24)) * 3
    assert calibration.pairs.shape[1] == 2 and codecs[1][1].calibration.pairs is None


def test_scores_do_not_change_between_the_two_spaces():
    after, before = (fitted("llama31", space)[1][1][0].calibration for space in ("post", "pre"))
    rope = Rope(tiny.load("llama31", "float32", "cpu")[0])
    assert (before.x - after.x).abs().max() > 0.1
    torch.testing.assert_close(rope.rotate(before.x[None], before.positions[None])[0], after.x, atol=1e-5, rtol=0)
    torch.testing.assert_close(rope.rotate(before.queries[None], before.positions[None])[0], after.queries, atol=1e-5, rtol=0)


def reference_gradients(model, ids, space):
    """Squared gradients [T, H * D] of the mean loss at layer 1's keys and values, by replacing the projections' outputs with leaves."""
    attention, leaves = model.model.layers[1].self_attn, {}

    def replace(name):
        def hook(module, args, out):
            leaves[name] = out.detach().requires_grad_()
            return leaves[name]

        return hook

    hooks = [getattr(attention, f"{n}_proj").register_forward_hook(replace(n)) for n in "kv"]
    logits = model(ids[None]).logits
    for hook in hooks:
        hook.remove()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:])
    key, value = torch.autograd.grad(loss, [leaves["k"], leaves["v"]])
    if space == "post":
        turned = key[0].unflatten(-1, (2, 16)).transpose(0, 1)[None]
        rope = Rope(model)
        key = (rope.rotate(turned, torch.arange(len(ids))[None], 1) / rope.scaling(1) ** 2)[0].transpose(0, 1).flatten(1)[None]
    return key[0].square(), value[0].square()


@pytest.mark.parametrize("space", ["pre", "post"])
@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("name", ["llama", "llama_yarn"])
def test_gradients_are_those_of_autograd_in_the_codecs_space(name, group, space):
    if group == 16 and name == "llama_yarn":
        pytest.skip("whole heads of keys keep the rotation's constant scale, which no weight depends on")
    model, codecs = fitted(name, space, group)
    wanted = [torch.cat(parts) for parts in zip(*(reference_gradients(model, ids, space) for ids in SAMPLES))]
    for codec, reference in zip(codecs[1], wanted):
        summed = reference.unflatten(-1, (-1, group)).sum(-1)
        torch.testing.assert_close(codec.calibration.grads, summed, rtol=1e-3, atol=float(summed.max()) * 1e-5)


def test_neither_batches_nor_memory_change_what_is_recorded():
    _, codecs = fitted(group=4)
    for options in ({"batch_size": 2}, {"memory_gb": 1e-6}):
        for pair, again in zip(codecs, fitted(group=4, **options)[1]):
            for a, b in zip(pair, again):
                torch.testing.assert_close(a.calibration.x, b.calibration.x, atol=1e-6, rtol=1e-5)
                torch.testing.assert_close(a.calibration.grads, b.calibration.grads, rtol=1e-3, atol=float(a.calibration.grads.max()) * 1e-5)


def test_recording_leaves_no_gradient_on_the_model():
    model, codecs = fitted(group=4)
    assert all(p.grad is None for p in model.parameters()) and not codecs[0][0].calibration.x.requires_grad


def test_text_that_is_missing_short_or_binary_is_refused(tmp_path):
    _, tokenizer = tiny.load("llama", "float32", "cpu")
    (tmp_path / "short.txt").write_text("four short words here")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refusal, match="gives 0 windows of 512 tokens"):
        calibrate.windows(tokenizer, str(tmp_path / "short.txt"), 2, 512)
    with pytest.raises(Refusal, match="not UTF-8"):
        calibrate.text(str(tmp_path / "binary.txt"))
    with pytest.raises(Refusal, match="no text at"):
        calibrate.text(str(tmp_path / "none.txt"))


def test_windows_follow_each_other(tmp_path):
    import gzip

    _, tokenizer = tiny.load("llama", "float32", "cpu")
    words = " ".join(f"word{i}" for i in range(200))
    (tmp_path / "text.gz").write_bytes(gzip.compress(words.encode()))
    ids = tokenizer(words, add_special_tokens=False).input_ids
    parts = calibrate.windows(tokenizer, str(tmp_path / "text.gz"), 3, 16, offset=5)
    assert torch.cat(parts).tolist() == ids[5:53]
