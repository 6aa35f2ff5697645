"""The codecs give the same codes on a GPU as on the CPU, and follow their buffers when moved."""

import copy

import pytest
import torch

from blockgtq import BlockGTQ, TurboQuantMSE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    "make",
    [
        lambda: TurboQuantMSE(3),
        lambda: TurboQuantMSE(5, rotation="hadamard", codebook="exact", gain="least_squares", center=True, norm_dtype="log8"),
        lambda: BlockGTQ(3),
        lambda: BlockGTQ(2.5, codebook="exact", gain="least_squares", center=True, partial="split"),
    ],
)
def test_equal_codes_on_both_devices(make, calibrate):
    calibration = calibrate(heads=8, tokens=700, dim=128, rotary=64)
    codec = make().fit(calibration)
    x = calibration.x[None].half()
    expected = codec.encode(x)
    decoded = codec.decode(expected)
    moved = copy.deepcopy(codec).cuda()
    codes = moved.encode(x.cuda())
    assert all(torch.equal(codes[name].cpu(), expected[name]) for name in expected)
    torch.testing.assert_close(moved.decode(codes).cpu(), decoded, rtol=1e-4, atol=1e-4)
    chunks = [moved.encode(chunk) for chunk in x.cuda().split([1, 3, 696], 2)]
    assert all(torch.equal(torch.cat([c[name] for c in chunks], 2), codes[name]) for name in codes)
    for field in ("x", "queries", "pairs", "positions", "inv_freq"):
        setattr(calibration, field, getattr(calibration, field).cuda())
    fitted = make().fit(calibration)
    assert all(buffer.is_cuda for buffer in fitted.buffers()) and fitted.bits == codec.bits
    assert torch.isfinite(fitted.decode(fitted.encode(x.cuda()))).all()
