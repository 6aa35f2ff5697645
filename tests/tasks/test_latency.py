"""task=latency: times the cache that is scored, says how, keeps what failed, and never times what is wrong."""

import json

import pytest
import torch

from kernels import backend
from kvq import compiled, fill, report, runner
from kvq.errors import Refusal
from kvq.tasks import latency
from tests.kvq.codecs import bind
from tests.kvq.test_decode import vector_codecs
from tests.kvq.test_paged_route import codecs
from tests.tasks.test_canary import compose


def options(**changes):
    shipped = {
        "context": [64, 300],
        "batch": [1],
        "pairs": None,
        "cache_gb": None,
        "prefill": 64,
        "chunk": 48,
        "encode": 32,
        "repeats": 3,
        "seconds": 60,
        "box": 600,
        "limit": None,
    }
    return {**shipped, **changes}


def records(lm, **changes):
    task = latency.Latency(**options(**changes))
    return task, list(task.run(lm, task.examples(lm)))


def vectors(**held):
    return bind("llama", vector_codecs, **{"attention": "fused", **held})


def test_a_row_has_both_sides_of_every_part():
    lm = vectors()
    task, (short, long) = records(lm, prefill=64)
    assert [r["subset"] for r in (short, long)] == ["b1 t64 eager emulated", "b1 t300 eager emulated"]
    assert "prefill_ms" not in long["metrics"], "300 tokens are more than 64"
    for record in (short, long):
        m = record["metrics"]
        assert not record["reasons"] and not [name for name in m if name.startswith("failed")], record["reasons"]
        for name in ("step_ms", "fp16_sdpa_ms", "encode_tokens_per_second", *(["prefill_ms", "fp16_sdpa_prefill_ms"] if record is short else [])):
            assert 0 < m[f"{name}/p5"] <= m[name] <= m[f"{name}/p95"]
        assert m["tokens_per_second"] == pytest.approx(1e3 / m["step_ms"]) and m["speedup"] == pytest.approx(m["fp16_sdpa_ms"] / m["step_ms"])
        assert 0 <= m["check/difference"] < 1e-4 and m["bytes/weights"] == sum(p.numel() * 4 for p in lm.model.parameters())
    held = [record["metrics"]["bytes/cache"] - lm.table_bytes for record in (short, long)]
    assert held[0] / 64 == held[1] / 300 == 2 * 2 * 2 * 16 / 8, "one bit per value of two layers"


@pytest.mark.skipif(not backend._installed(), reason="Triton is not installed here")
def test_pages_are_timed_through_the_kernels(monkeypatch):
    monkeypatch.setattr(fill, "READ", 32)
    lm = bind("llama", codecs("tq_mse", 2), attention="fused")
    _, (record,) = records(lm, context=[70], prefill=0, encode=8)
    assert not record["reasons"] and record["metrics"]["check/difference"] < 2e-3
    assert lm.usage()["encoded"] == 70


def test_without_a_kernel_the_row_says_reference():
    _, (record,) = records(bind("llama"), context=[40], batch=[2])
    assert record["subset"] == "b2 t40 eager reference" and record["metrics"]["step_ms"] > 0 and not record["reasons"]
    assert "prefill_ms" not in record["metrics"], "prompts are timed for one row"


def test_a_compiled_step_is_compared_and_its_row_says_so():
    task, (record,) = records(vectors(), context=[64], batch=[2], compile="default")
    m = record["metrics"]
    assert record["subset"] == "b2 t64 eager emulated compiled" and not record["reasons"]
    assert m["step_ms"] > 0 and m["fp16_sdpa_ms"] > 0 and m["compiled/graphs"] == 1, "both sides run one graph"
    assert max(m["check/step_compiled"], m["check/fp16_sdpa_compiled"]) < 1e-5 and m["compiled/kernels"] > 0 and m["compiled/seconds"] > 0


def test_prompts_and_encoding_are_not_compiled():
    task = latency.Latency(**options(compile="default"))
    assert set(task._parts(vectors(), 1, 64, 1, 0.0)) == {"step", "fp16_sdpa"}


@pytest.mark.parametrize("changes,held", [({"compile": "reduce-overhead"}, {}), ({"compile": "default"}, {"attention": "reference"})], ids=str)
def test_what_cannot_be_compiled_is_refused(changes, held):
    with pytest.raises(Refusal, match="task.compile"):
        records(vectors(**held), **changes)


def test_a_compiled_step_with_other_logits_is_not_timed(monkeypatch):
    right = compiled.Step._run
    monkeypatch.setattr(compiled.Step, "_run", lambda self, *inputs: 1.1 * right(self, *inputs))
    _, (record,) = records(vectors(), context=[64], batch=[2], compile="default")
    assert all("compiled step's logits differ" in record["reasons"][side] for side in ("step", "fp16_sdpa")) and "step_ms" not in record["metrics"]


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    lm = vectors()
    pair = type(fill.fresh(lm).layers[0].fused)
    right = pair.attend
    monkeypatch.setattr(pair, "attend", lambda *a, **k: (1.1 * right(*a, **k)[0], None))
    _, (record,) = records(lm, context=[64])
    assert "differs from its definition by 0.1" in record["reasons"]["step"] and record["metrics"]["failed/step"] == 1
    assert "step_ms" not in record["metrics"] and "speedup" not in record["metrics"] and record["metrics"]["fp16_sdpa_ms"] > 0


def test_what_fails_is_a_row_and_the_rest_goes_on(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("no room\nfor it")

    monkeypatch.setattr(fill, "exact", full)
    _, found = records(vectors())
    for record in found:
        assert record["reasons"] == {"fp16_sdpa": "OutOfMemoryError: no room"} and record["metrics"]["failed/fp16_sdpa"] == 1
        assert record["metrics"]["step_ms"] > 0 and "speedup" not in record["metrics"]


def test_a_prefill_that_takes_too_long_stops():
    _, (record,) = records(vectors(), context=[64], seconds=0)
    assert "0 of 64 tokens" in record["reasons"]["prefill"] and record["metrics"]["step_ms"] > 0


def test_what_does_not_begin_in_time_is_a_row():
    _, found = records(vectors(), box=0, prefill=0)
    assert [r["reasons"] for r in found] == [{"step": "Refusal: not begun: task.box=0 seconds were over."}] * 2
    assert all(r["metrics"]["failed/step"] == 1 and r["metrics"]["shape/tokens"] > 0 for r in found)


def test_equal_memory_gives_each_side_its_own_rows():
    lm = vectors()
    room = lm.table_bytes + 12 * 300 * 16  # two layers of 64 values at one bit take 16 bytes a token, at sixteen 256
    _, (record,) = records(lm, pairs=[[None, 300]], cache_gb=room / 1e9 + 1e-9, prefill=0)
    m = record["metrics"]
    assert record["subset"].endswith("GB t300 eager emulated") and (m["shape/batch"], m["shape/fp16_batch"]) == (12, room // (300 * 256)) and not record["reasons"]
    assert m["speedup"] == pytest.approx(m["tokens_per_second"] / m["fp16_sdpa_tokens_per_second"])
    with pytest.raises(Refusal, match="does not hold one sequence"):
        records(lm, pairs=[[None, 300]], cache_gb=1e-6)


def test_break_even_lies_between_the_lengths_around_it():
    def record(tokens, ours, theirs, batch="b1"):
        return {"subset": f"{batch} t{tokens} graph kernels", "metrics": {"shape/tokens": tokens, "step_ms": ours, "speedup": theirs / ours}}

    task = latency.Latency(**options())
    (row,) = task.derived([record(1000, 4.0, 2.0), record(3000, 4.0, 6.0), record(9000, 5.0, 18.0), record(10, 5.0, 1.0, "b8")])
    assert row["subset"] == "b1 t3000 graph kernels" and row["value"] == pytest.approx(2000) and row["n"] == 3
    assert task.derived([record(1000, 1.0, 2.0), record(2000, 1.0, 2.0)])[0]["value"] == 1000, "a bound"
    assert not task.derived([record(1000, 2.0, 1.0), record(2000, 3.0, 1.0)])


@pytest.mark.parametrize(
    "changes,word", [({"pairs": [[1]]}, "pairs"), ({"pairs": [[None, 64]]}, "cache_gb"), ({"batch": [0]}, "whole numbers"), ({"repeats": 2}, "repeats")], ids=str
)
def test_what_cannot_be_timed_is_refused(changes, word):
    with pytest.raises(Refusal, match=word):
        latency.Latency(**options(**changes))


def test_one_run_end_to_end(tmp_path, capsys):
    words = ["model=tiny", "quant=int4", "task=latency", "task.context=[32,48]", "task.repeats=3", "task.encode=32", "task.prefill=32"]
    cfg = compose(*words, f"results={tmp_path}/results", f"outputs={tmp_path}/outputs")
    frame = runner.run(cfg, {"model": "tiny", "quant": "int4", "task": "latency", "calib": "text"})
    folder = tmp_path / "results" / "runs"
    assert len(list(folder.glob("*.parquet"))) == 1, "no fp16 cell beside it: fp16 is in its own rows"
    assert set(frame[frame.metric == "step_ms"].subset) == {"b1 t32 eager reference", "b1 t48 eager reference", "average"}
    assert (frame.encoded_tokens == 80).all() and not frame.metric.str.startswith("failed").any()
    kept = [json.loads(line) for line in (folder / f"{frame.run[0]}.jsonl").read_text().splitlines()]
    assert [r["reasons"] for r in kept] == [{}, {}]
    late = frame[(frame.subset != "b1 t48 eager reference") | frame.metric.str.startswith("shape/")]
    capsys.readouterr()
    report.show(late.sort_values("subset", ascending=False, kind="stable"))
    assert "step_ms" in (told := capsys.readouterr().out) and "b1 t48" in told, "an example that failed has a line without a score"
