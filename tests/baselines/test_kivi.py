"""KIVI against a loop over its formula, its stored bits, and the lag of the scale-only variant."""

from types import SimpleNamespace

import pytest
import torch

from kernels.attention import attend
from kernels.prefill import attend_chunk
from kvq.baselines.kivi import KIVI, KIVIScaleOnly


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shaped(codec, heads, dim):
    return codec.fit(SimpleNamespace(x=normal(heads, 64, dim, seed=7)))


def reference(group, bits):
    """The paper's formula for one group, with its float16 scale and minimum."""
    low = group.min().half().float()
    scale = ((group.max() - group.min()) / (2**bits - 1)).half().float()
    return ((group - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_keys_per_channel(bits):
    x = normal(2, 2, 48, 12)
    codec = shaped(KIVI(bits, axis="channel", group=16), 2, 12)
    decoded = codec.decode(codec.encode(x))
    for b, h, g, d in [(0, 0, 0, 0), (1, 0, 2, 5), (0, 1, 1, 11), (1, 1, 2, 3)]:
        where = (b, h, slice(16 * g, 16 * g + 16), d)
        assert torch.allclose(decoded[where], reference(x[where], bits), atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_values_per_token(bits):
    x = normal(2, 2, 5, 32)
    codec = shaped(KIVI(bits, axis="token", group=16), 2, 32)
    decoded = codec.decode(codec.encode(x))
    for b, h, t, g in [(0, 0, 0, 0), (1, 0, 4, 1), (0, 1, 2, 1), (1, 1, 3, 0)]:
        where = (b, h, t, slice(16 * g, 16 * g + 16))
        assert torch.allclose(decoded[where], reference(x[where], bits), atol=1e-6)


def test_two_bits_by_hand():
    x = torch.zeros(1, 1, 8, 1)
    x[0, 0, :, 0] = torch.tensor([0, 3, 1.4, 1.6, 2.4, 0.6, 0.5, 2.5])  # halves go to the even code, as torch rounds
    codec = shaped(KIVI(2, axis="channel", group=8), 1, 1)
    assert codec.decode(codec.encode(x)).flatten().tolist() == [0, 3, 1, 2, 2, 1, 0, 2]


@pytest.mark.parametrize(
    "bits, axis, group, dim, stored",
    [
        (2, "channel", 32, 128, 3.0),
        (4, "channel", 32, 128, 5.0),
        (2, "channel", 128, 128, 2.25),
        (1, "channel", 128, 128, 1.25),
        (1, "channel", 32, 80, 2.0),
        (2, "token", 32, 128, 3.0),
        (2, "token", 128, 128, 2.25),
        (2, "token", 128, 64, 2.5),  # a head of 64 channels is one group
        (3, "token", 32, 96, 4.0),
    ],
)
def test_stored_bits(bits, axis, group, dim, stored):
    codec = shaped(KIVI(bits, axis=axis, group=group), 2, dim)
    assert codec.bits == stored
    assert codec.block == (group if axis == "channel" else 1)


def test_outlier_channel_hurts_values_not_keys():
    x = normal(1, 1, 64, 32)
    x[..., 5] += 40
    errors = {}
    for axis in ("channel", "token"):
        codec = shaped(KIVI(2, axis=axis, group=32), 1, 32)
        errors[axis] = float((codec.decode(codec.encode(x)) - x).square().mean())
    assert errors["token"] > 5 * errors["channel"]


@pytest.mark.parametrize(
    "bits, options, says",
    [
        (5, {"axis": "token", "group": 32}, "1, 2, 3 or 4"),
        (1.5, {"axis": "token", "group": 32}, "1, 2, 3 or 4"),
        (2, {"axis": "head", "group": 32}, "'channel'"),
        (2, {"axis": "token", "group": 12}, "multiple of 8"),
    ],
)
def test_bad_options(bits, options, says):
    with pytest.raises(ValueError, match=says):
        KIVI(bits, **options)


def test_channel_groups_must_divide_the_head():
    with pytest.raises(ValueError, match="does not divide the head dimension 80"):
        KIVI(2, axis="token", group=32).check(8, 80)
    KIVI(2, axis="channel", group=32).check(8, 80)


def scale_only(x, bits=3, tokens=2048):
    return KIVIScaleOnly(bits, group=32, calibration_tokens=tokens).fit(SimpleNamespace(x=x))


def test_scale_only_uses_the_scales_of_the_group_before():
    x, calibration = normal(2, 2, 128, 8), normal(2, 64, 8, seed=7)
    codes = scale_only(calibration).encode(x, {})
    assert torch.equal(codes["minimum"][:, :, 0], calibration.amin(1).half().expand(2, -1, -1))
    groups = x.unflatten(2, (4, 32))
    assert torch.equal(codes["minimum"][:, :, 1:], groups.amin(3)[:, :, :-1].half())
    assert torch.equal(codes["scale"][:, :, 1:], ((groups.amax(3) - groups.amin(3)) / 7)[:, :, :-1].half())


def test_scale_only_clamps_what_the_lagging_scale_does_not_reach():
    x = normal(1, 1, 96, 4).clamp(-2, 2)
    x[:, :, 32:64] *= 10  # the second group outgrows the first
    codec = scale_only(normal(1, 640, 4, seed=7).clamp(-2, 2), bits=4)
    decoded = codec.decode(codec.encode(x, {}))
    error = (decoded - x).square().mean((0, 1, 3)).view(3, 32).mean(1)
    assert decoded[:, :, 32:64].abs().max() <= 2.01
    assert error[1] > 1000 * error[0]
    assert 20 * error[0] < error[2]  # and the third is coded with steps ten times too wide


def test_scale_only_state_continues_a_stream_and_starts_afresh():
    x = normal(2, 1, 96, 4)
    codec = scale_only(normal(1, 64, 4, seed=7))
    whole, state = codec.encode(x, {}), {}
    first, rest = codec.encode(x[:, :, :32], state), codec.encode(x[:, :, 32:], state)
    assert all(torch.equal(torch.cat([first[k], rest[k]], 2), whole[k]) for k in whole)
    assert {k: v.shape for k, v in state.items()} == {"minimum": (2, 1, 4), "scale": (2, 1, 4)}
    again = codec.encode(x[:, :, 32:64], {})
    assert not torch.equal(again["minimum"], rest["minimum"][:, :, :1])


def test_scale_only_reads_only_the_first_calibration_tokens():
    x = normal(1, 200, 4, seed=7)
    x[:, 100:] *= 50
    assert torch.equal(scale_only(x, tokens=100).scale, scale_only(x[:, :100]).scale)


def test_scale_only_bad_options():
    with pytest.raises(ValueError, match="1, 2, 3 or 4"):
        KIVIScaleOnly(5, group=32, calibration_tokens=1)
    with pytest.raises(ValueError, match="positive"):
        KIVIScaleOnly(3, group=32, calibration_tokens=0)


@pytest.mark.parametrize("bits, dim, group", [(2, 64, 32), (4, 32, 16), (3, 64, 64)])
def test_attention_reads_what_the_codecs_decode(bits, dim, group):
    pytest.importorskip("triton")
    key, value = shaped(KIVI(bits, axis="channel", group=32), 2, dim), shaped(KIVI(bits, axis="token", group=group), 2, dim)
    fused = key.fuse(value)
    if group == 16:
        assert fused is None, "16 channels of a value share a scale: less than the kernel decodes at a time"
        return
    held, dense = [fused.held(i) for i in (0, 1)], []
    for pages, codec, tokens in zip(held, (key, value), (96, 101)):
        x = 3 * normal(2, 2, tokens, dim, seed=tokens) + 0.7
        for part in (x[:, :, :32], x[:, :, 32:]):
            codes = codec.encode(part)
            pages.append(codes)
        codes = codec.encode(x)
        assert all(torch.equal(pages.codes[name], codes[name]) for name in codes), "pages hold the codec's codes, bit for bit"
        dense.append(codec.decode(codes)[:, :, :90])
    query, first = normal(2, 4, 7, dim, seed=9), torch.tensor([0, 33])
    for ours, theirs in (
        (fused.attend(query[:, :, 6], *held, 90, scale=0.2, first=first), attend(query[:, :, 6], *dense, 0.2, first)),
        (fused.attend_chunk(query, *held, 90, 83, scale=0.2, first=first), attend_chunk(query, *dense, 0.2, 83, first)),
    ):
        assert (ours[0] - theirs[0]).norm() <= 2e-3 * theirs[0].norm()
        torch.testing.assert_close(ours[1], theirs[1], atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("dim, group", [(64, 64), (48, 32)])
def test_keys_whose_groups_are_no_pages_have_no_kernel(dim, group):
    key = shaped(KIVI(2, axis="channel", group=group), 2, dim)
    assert key.fuse(shaped(KIVI(2, axis="token", group=dim), 2, dim)) is None
