"""What a timing of encoding is checked against, and the rows it leaves."""

import pytest
import torch

pytest.importorskip("triton")

from kernels import bench_encode, encode  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"timed": False, "device": DEVICE, "dim": 32}


@pytest.mark.parametrize("dtype", bench_encode.TYPES.values(), ids=str)
@pytest.mark.parametrize("name", ["tq_k2v2", "blockgtq_k3v3"])
def test_cells_check_their_codes(name, dtype, monkeypatch):
    monkeypatch.setattr(bench_encode, "SLICE", 40)
    assert bench_encode.prompt(name, 2, dtype, tokens=100, **SMALL) == {"checked": True, "bytes": 2 * 2 * 100 * 32 * 2}
    assert bench_encode.token(name, 2, dtype, batch=2, tokens=64, **SMALL) == {"checked": True}


def test_a_neighbouring_level_may_move_its_gain():
    spec = bench_encode.specs("blockgtq_k3v3", 2, DEVICE, 32)[0]
    held, x = bench_encode.empty(spec, 1, 64), torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    count = torch.full((1,), 64, dtype=torch.int32, device=DEVICE)
    encode.write(held, x, torch.zeros_like(count), count)
    codes, _ = encode.symbols(spec, x)
    segment = spec.segments[0]
    channel = next(c for c in range(segment.start, segment.start + segment.size) if codes[0, segment.head, 5, c] % 2 == 0)
    near = codes.clone()
    near[0, segment.head, 5, channel] += 1
    held.symbols = lambda start, end: (near, gains)
    gains = encode.symbols(spec, x)[1].clone()
    gains[0, 0, 5] *= 1.3
    assert bench_encode.right(held, x, 0)
    gains[0, 0, 6] *= 1.3
    assert not bench_encode.right(held, x, 0), "the gain of a token whose codes agree"


@pytest.mark.parametrize("spoil", ["bit", "gain", "missing"])
def test_the_check_sees_wrong_codes(spoil):
    spec = bench_encode.specs("blockgtq_k3v3", 2, DEVICE, 32)[0]
    held, x = bench_encode.empty(spec, 1, 64), torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    count = torch.full((1,), 64, dtype=torch.int32, device=DEVICE)
    encode.write(held, x, torch.zeros_like(count), count)
    assert bench_encode.right(held, x, 0) and bench_encode.right(held, x, 32, 32)
    if spoil == "bit":
        held.words[0, 0, 1] ^= 0x01010101
    elif spoil == "gain":
        held.sides[0, 1, 0, 3] *= 1.02
    else:
        held.words[0, :, 1] = 0
    assert bench_encode.right(held, x[:, :, :32], 0) and not bench_encode.right(held, x, 32, 32)


def test_rows_of_a_cell(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(bench_encode, "prompt", lambda *args: {"times": (100.0, 90.0, 125.0), "bytes": 1e8, "checked": True})
    monkeypatch.setattr(bench_encode, "token", lambda *args: {"times": (10.0, 8.0, 20.0), "checked": False})
    rows = bench_encode.rows(("tq_k3v3", (16, 2), "float16"))
    assert [(row["kernel"], row["metric"], row["shape"], row["checked"]) for row in rows if row["metric"] == "time"] == [
        ("encode", "time", "q16 kv2 d128 b1 t131072", True),
        ("encode_append", "time", "q16 kv2 d128 b1 t131072", False),
        ("encode_append", "time", "q16 kv2 d128 b16 t131072", False),
    ]
    rate = next(row for row in rows if row["metric"] == "rate")
    assert (rate["unit"], rate["median"], rate["p5"], rate["p95"]) == ("GB/s", 1000.0, 800.0, pytest.approx(1111.1, abs=0.1))
    assert {row["command"].split()[2] for row in rows} == {"kernels.bench_encode"} and len({tuple(row) for row in rows}) == 1 and len(rows) == 6
