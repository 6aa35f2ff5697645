"""The benchmarks on a CPU with Triton's interpreter: what it compares and times is what it says, and what differs gets no time."""

import json
import time

import pytest
import torch

whole = pytest.importorskip("gsrq.bench", exc_type=ModuleNotFoundError)
bench = pytest.importorskip("gsrq.bench_attention", exc_type=ModuleNotFoundError)
from kernels import lookup_shares_triton  # noqa: E402  (needs triton too)


class Box:
    def __init__(self):
        self.rows = []

    def note(self, *row):
        self.rows.append(row)

    def spend(self, part, *arguments):
        part(*arguments)


@pytest.fixture
def small(monkeypatch):
    sizes = {"DEVICE": "cpu", "HEADS": 2, "QUERIES": 4, "DIM": 32, "LAYERS": 2, "HIDDEN": 16, "INNER": 24, "VOCABULARY": 40, "TOKENS": 130, "MEMORY": 5e5}
    for name, value in sizes.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(lookup_shares_triton, "MULTIPROCESSORS", 3)
    monkeypatch.setattr(bench, "measure", lambda run, sets, **options: [run(i) for i in range(sets)] and (3.0, 2.0, 4.0))
    return Box()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/kernels/test_lookup.py has the same on a GPU; here CPU tensors stand for it")
@pytest.mark.parametrize("name", bench.KERNELS)
@pytest.mark.parametrize("case", [bench.Case(16, 2), bench.Case(16, 2, shared=True, post=True), bench.Case(32, 2, bench.FP8)], ids=lambda c: c.name)
def test_right_outputs_pass_and_wrong_ones_do_not(small, case, name, monkeypatch):
    assert bench._difference(small, case, name) is None and small.rows[0][-1] < bench.TOLERANCE
    right = bench.KERNELS[name].attend
    monkeypatch.setattr(bench.KERNELS[name], "attend", lambda *a: tuple(1.01 * x for x in right(*a)))
    assert "differ" in bench._difference(small, case, name)


def test_rows_of_a_grid_and_of_steps(small, monkeypatch):
    monkeypatch.setattr(bench, "verified", lambda box, cases=None, names=None: [(bench.Case(16, 2), "bound")])
    monkeypatch.setattr(bench, "BACKENDS", {"fp16": bench.SDPBackend.MATH})
    monkeypatch.setattr(bench.KERNELS["bound"], "attend", lambda query, *rest: (query.float(), None))
    bench.grid(small, [(2, 64)])
    bench.memory(small, tokens=64)
    assert [row[1] for row in small.rows if row[3] == "time"] == ["fp16", "codes 1 bit d16 fp16 tables, bound"] * 2
    cache, batch = 2 * 2 * 2 * 64 * 32 * 2, int(5e5 // (2 * 2 * 2 * 64 * 32 * 2))
    assert small.rows[2][2] == f"q4 kv2 d32 b{batch} t64" and batch * cache <= 5e5
    tables = 2 * 2 * 4 * 2 * 256 * 16 * 2
    coded = int((5e5 - tables) // (cache / 16))
    assert small.rows[4][2] == f"q4 kv2 d32 b{coded} t64" and small.rows[5][3:5] == ("throughput at equal memory", "tokens/s")
    assert small.rows[5][-1] == pytest.approx((1e3 * coded / 3e-3, 1e3 * coded / 4e-3, 1e3 * coded / 2e-3))


@pytest.mark.parametrize("late", [False, True])
def test_a_calibration_reports_as_it_goes_and_says_what_is_extrapolated(late, monkeypatch, tmp_path):
    for name, value in {"DEVICE": "cpu", "HEADS": 1, "LAYERS": 3, "STREAMS": 1, "REPORT": 2, "BOX": whole.Box()}.items():
        monkeypatch.setattr(whole, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    whole.BOX.out, whole.BOX.end = tmp_path / "rows.json", time.monotonic() - 1 if late else float("inf")
    whole.calibration(n=260, rounds=1, whole=True)
    rows = json.loads(whole.BOX.out.read_text()) if whole.BOX.out.exists() else []
    found = [(row["provider"].split(", ")[2], row["metric"], row["median"]) for row in rows]
    if late:
        assert found == []  # one tensor, and reports come every two
        return
    steps = [("2 tensors timed", "time so far"), ("2 tensors timed", "extrapolation to 32 layers, K and V")]
    steps += [("4 tensors timed", "time so far"), ("4 tensors timed", "extrapolation to 32 layers, K and V"), ("6 tensors timed", "time of 32 layers, K and V")]
    assert [row[:2] for row in found] == steps
    assert found[1][2] == pytest.approx(3 * found[0][2]) and found[3][2] == pytest.approx(1.5 * found[2][2]) and found[0][2] < found[2][2] < found[4][2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/kernels/test_append.py has the same on a GPU; here CPU tensors stand for it")
@pytest.mark.parametrize("wrong", [False, True])
def test_an_appended_token_is_timed_where_its_codes_are_right(wrong, monkeypatch, capsys):
    from kernels import append

    for name, value in {"DEVICE": "cpu", "HEADS": 1, "DIM": 32, "LAYERS": 1, "BOX": Box(), "measure": lambda call, sets: [call(i) for i in range(sets)] and 3.0}.items():
        monkeypatch.setattr(whole, name, value)
    if wrong:
        launch = append._launch
        monkeypatch.setattr(append, "_launch", lambda held, *rest: (launch(held, *rest), held[1].add_(1)))
    whole.one_token()
    timed = [row[1] for row in whole.BOX.rows if row[3] == "time"]
    assert timed == (["as defined"] if wrong else ["one launch", "as defined"]) * 12
    assert ("not timed" in capsys.readouterr().out) == wrong
