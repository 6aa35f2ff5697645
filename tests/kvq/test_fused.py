"""The route to kernels that read packed codes: same tokens as reconstruction, whatever is padded, exact or reordered."""

import pytest
import torch

from kernels.attention import attend, merge
from kvq.errors import Refusal
from tests.kvq.codecs import NEAR, Lossy, bind, generate, pad_left, pairs, tokens


class Served(Lossy):
    """Lossy, with an `attend` that counts its calls and reads codes only."""

    calls = 0

    def fuse(self, value):
        return _Pair(self, value) if isinstance(value, Served) else None


class _Pair:
    def __init__(self, key, value):
        self.codecs = key, value

    def held(self, index):
        return None

    def attend(self, query, key, value, count, *, scale, first, positions):
        Served.calls += 1
        k, v = (codec.decode(held.codes)[:, :, :count] for codec, held in zip(self.codecs, (key, value)))
        return attend(query, k, v, scale, first)


@pytest.mark.parametrize("held", [{}, {"window": 7}, {"sink": 3, "window": 5}, {"window": 64}], ids=str)
@pytest.mark.parametrize("blocks", [(1, 1), (4, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("beams", [1, 3])
def test_reading_codes_gives_what_reconstruction_gives(held, blocks, beams):
    def make(model):
        return pairs(model, lambda: Served(block=blocks[0]), lambda: Served(block=blocks[1]))

    ids, mask = pad_left(tokens(2, 20), [0, 5])
    Served.calls = 0
    outs = [generate(bind("llama", make, attention=how, memo=False, **held), ids, mask, steps=12, num_beams=beams) for how in ("fused", "reference")]
    assert torch.equal(outs[0].tokens, outs[1].tokens)
    torch.testing.assert_close(outs[0].logits, outs[1].logits, **NEAR)
    assert outs[0].cache.audit() == outs[1].cache.audit()
    assert (Served.calls > 0) == (held.get("window") != 64)


def test_a_pair_without_a_kernel_is_refused():
    with pytest.raises(Refusal, match="attention=reference"):
        bind("llama", attention="fused").new_cache()
    with pytest.raises(Refusal, match="attention=fast"):
        bind("llama", attention="fast").new_cache()


def test_parts_merge_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(*shape, generator=generator) for shape in ((2, 6, 16), (2, 3, 11, 16), (2, 3, 11, 16)))
    whole = attend(query, key, value, 0.3, first=torch.tensor([0, 5]))
    halves = [attend(query, key[:, :, s], value[:, :, s], 0.3, first) for s, first in ((slice(0, 4), torch.tensor([0, 5])), (slice(4, 11), torch.tensor([0, 1])))]
    for ours, theirs in zip(merge(halves), whole):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert halves[0][1][1].isneginf().all() and not halves[0][0][1].any(), "a row without visible tokens weighs nothing"
    last = attend(query, key, value, 0.3, window=4)
    torch.testing.assert_close(last[0], attend(query, key[:, :, 7:], value[:, :, 7:], 0.3)[0], atol=1e-6, rtol=1e-5)
