"""Whole steps are drawn from results/latency alone, beside kernels; where there are none one sentence says so."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from experiments import blockgtq_deployment, gsrq_latency, gsrq_memory, latency, latency_figure, ledger, style
from kvq import results

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    """The committed kernel timings, without any whole step."""
    (tmp_path / "latency").mkdir()
    for name in ("decode_attention", "vq_attention"):
        shutil.copy(ROOT / "results" / "latency" / f"{name}.parquet", tmp_path / "latency")
    shutil.copytree(ROOT / "results" / "reported", tmp_path / "reported")
    return tmp_path


def write(folder, quant, bits, examples, how="graph kernels", model="random_llama31_8b", compiled=None, hour=0):
    """One run; examples: subset without `how` to metrics."""
    run = results.run_id({"quant": quant, "bits": bits, "how": how, "model": model, "compiled": compiled, "hour": hour})
    task, given = ("latency_compiled", {"compile": compiled}) if compiled else ("latency", {})
    options = {"model": {"name": model}, "task": {"how": how, "box": hour, **given}, "calib": {}, "prefill": "quantized", "seed": 0, "quant": {"key": {"piece": 128, "bits": bits}}}
    common = {"run": run, "model": model, "quant": quant, "task": task, "data": "synthetic", "calib": "text", "bits": bits, "bits_stored": bits, "bits_total": bits,
              "encoded_tokens": 10, "stderr": 0.0, "n": 1, "seed": 0, "config": json.dumps(options), "commit": "c", "dirty": False,
              "date": f"2026-11-30T{hour:02}:00:00Z", "device": "a GPU", "torch": "", "transformers": ""}  # fmt: skip
    rows = [{**common, "subset": f"{subset} {how}", "metric": name, "value": value} for subset, metrics in examples.items() for name, value in metrics.items()]
    results.write(rows, folder / "latency" / "runs" / f"{run}.parquet")


def example(batch, tokens, ours, fp16, **more):
    shape = {"shape/batch": batch, "shape/tokens": tokens}
    return {"step_ms": ours, "step_ms/p5": ours * 0.9, "step_ms/p95": ours * 1.1, "fp16_flash_ms": fp16, "speedup": fp16 / ours, **shape, **more}


@pytest.mark.parametrize("module", [gsrq_latency, blockgtq_deployment], ids=lambda m: m.__name__)
def test_without_steps_one_sentence_says_so(module, folder):
    rows = module.rows(folder)
    text = module.table(rows).markdown()
    assert "No whole step has been timed on a GPU yet: `python run.py -m experiment=" in text and "Whole steps in one CUDA graph" not in text
    assert len({axis.get_subplotspec().rowspan.start for axis in module.draw(rows).axes}) == 1, "no empty panels"
    assert set(module.speedups(rows)["against"]) == {"gqa"}


def test_steps_are_drawn_and_go_to_their_own_paper(folder):
    style.setup()
    write(folder, "gsrq", 1.0, {"b1 t1024": example(1, 1024, 6.0, 5.0), "b1 t8192": example(1, 8192, 6.0, 7.0), "100GB t32768": example(370, 32768, 60.0, 30.0)})
    write(folder, "blockgtq", 3.0, {"b1 t8192": example(1, 8192, 3.0, 3.5), "b1 t16384": {"failed/step": 1.0}}, model="random_qwen25_3b")
    write(folder, "gsrq", 0.5, {"b1 t64": example(1, 64, 9.0, 1.0)}, how="eager emulated")
    vector, scalar = latency.steps(folder, vector=True), latency.steps(folder, vector=False)
    assert vector["memory"].tolist() == ["b1", "b1", "100GB"] and set(vector["bits"]) == {1.0}, "what ran call by call is no measurement of a step"
    assert scalar["median"].dropna().tolist() == [3.0] and set(scalar["quant"]) == {"blockgtq"}
    for module, words in ((gsrq_latency, ["random_llama31_8b", "100GB"]), (blockgtq_deployment, ["random_qwen25_3b", "3.5"])):
        rows = module.rows(folder)
        text = module.table(rows).markdown()
        assert "Whole steps in one CUDA graph, milliseconds" in text and "a GPU, 2026-11-30" in text and all(word in text for word in words)
        assert "has been timed on a GPU yet" not in text and len({axis.get_subplotspec().rowspan.start for axis in module.draw(rows).axes}) == 2


def test_of_several_runs_of_a_cell_the_newest_number_counts(folder):
    write(folder, "blockgtq", 3.0, {"b1 t8192": example(1, 8192, 3.0, 3.5, prefill_ms=90.0)}, model="random_qwen25_3b", hour=2)
    write(folder, "blockgtq", 3.0, {"b1 t8192": example(1, 8192, 2.0, 3.25)}, model="random_qwen25_3b", hour=7)
    write(folder, "tq_mse", 3.0, {"b1 t8192": example(1, 8192, 1.5, 3.0)}, model="random_qwen25_3b", hour=5)
    found = latency.steps(folder, vector=False).set_index("quant")
    assert found["median"].to_dict() == {"blockgtq": 2.0, "tq_mse": 1.5} and found.at["blockgtq", "flash"] == 3.25
    assert found.at["blockgtq", "prefill"] == 90.0, "what the newer run did not measure stays"


def test_compiled_steps_stand_beside_the_others(folder):
    style.setup()
    cell = {"b1 t8192": example(1, 8192, 3.0, 3.5), "b1 t131072": example(1, 131072, 4.0, 5.0)}
    write(folder, "blockgtq", 3.0, cell, model="random_qwen25_3b")
    before = blockgtq_deployment.rows(folder)
    faster = {"b1 t8192": example(1, 8192, 1.25, 1.5), "b1 t131072": example(1, 131072, 2.25, 2.0)}
    write(folder, "blockgtq", 3.0, faster, how="graph kernels compiled", model="random_qwen25_3b", compiled="default")
    rows = blockgtq_deployment.rows(folder)
    pd.testing.assert_frame_equal(blockgtq_deployment.whole(rows)[["tokens", "median"]], blockgtq_deployment.whole(before)[["tokens", "median"]])
    text, titles = blockgtq_deployment.table(rows).markdown(), [axis.get_title() for axis in blockgtq_deployment.draw(rows).axes]
    assert "| default |" in text and "2.25" in text and "| compiled |" in text and "compiled" not in blockgtq_deployment.table(before).markdown()
    assert "shape of Qwen2.5-3B" in titles and "shape of Qwen2.5-3B, compiled" in titles


def test_measured_peaks_join_the_memory_figure(folder):
    write(folder, "gsrq", 1.0, {"b8 t1024": example(8, 1024, 6.0, 5.0, **{"bytes/peak": 19e9})})
    text = gsrq_memory.table(gsrq_memory.rows(folder)).markdown()
    assert "No step of GSRQ at .75 bit" in text and "has been timed on a GPU yet" not in text, "steps at other rates have been"
    more = {"bytes/peak": 18e9, "bytes/fp16_flash_peak": 20e9}
    write(folder, "gsrq", 0.75, {f"b{b} t1024": example(b, 1024, 6.0, 5.0, **more) for b in (8, 64)} | {"b1 t8192": example(1, 8192, 6.0, 7.0, **more)})
    rows = gsrq_memory.rows(folder)
    assert rows[rows["arm"] == "measured GSRQ"][["batch", "value"]].to_numpy().tolist() == [[8, 18.0], [64, 18.0]]
    assert "measured FP16" in gsrq_memory.table(rows).markdown() and gsrq_memory.draw(rows).axes


def timing(provider, median, kernel="decode_attention", metric="time", unit="us", shape="q32 kv8 d128 b1 t8192", **more):
    where = {"gpu": "a GPU", "torch": "", "triton": "", "date": "2026-11-30", "command": "python -m bench", "commit": "c"}
    return {"kernel": kernel, "provider": provider, "shape": shape, "metric": metric, "unit": unit, "median": median, "p5": median, "p95": median, **where, **more}


def test_the_fastest_variant_is_drawn_and_every_variant_is_in_the_table(tmp_path):
    style.setup()
    (tmp_path / "latency").mkdir()
    at = {"kernel": "decode_step", "shape": "q32 kv8 d128 b23 t32768"}
    rows = [timing("fp16 flash", 20.0), timing("fp16 cudnn", 10.0), timing("codes 1 bit d32 fp16 tables, tiles", 50.0), timing("codes 1 bit d32 fp8 tables, bound", 40.0),
            timing("fp16 flash", 30.0, unit="ms", **at), timing("fp16 flash", 800.0, metric="throughput at equal memory", **at),
            timing("codes 1 bit d32 fp8 tables, bound", 90.0, **at), timing("codes 1 bit d32 fp8 tables, bound", 400.0, metric="throughput at equal memory", **at)]  # fmt: skip
    pd.DataFrame(rows).to_parquet(tmp_path / "latency" / "vq_attention.parquet")
    encoded = [timing("triton greedy", 4e5, "rvq_encode", "throughput", "tokens/s", "n9"), timing("triton (replaced)", 1.0, "rvq_encode", "throughput", "tokens/s", "n9")]
    pd.DataFrame(encoded).to_parquet(tmp_path / "latency" / "vq_encode.parquet")
    found = gsrq_latency.rows(tmp_path)
    speed = latency.speedups(found)
    kernel = speed[speed["kind"] == "kernel"]
    assert kernel["ratio"].tolist() == [0.2, 0.25] and kernel["fastest"].tolist() == [False, True] and kernel["times_flash"].tolist() == [2.5, 2.0]
    assert speed.loc[speed["kind"] == "memory", "ratio"].tolist() == [0.5]
    text = gsrq_latency.table(found).markdown()
    assert all(word in text for word in ("fp16 tables, tiles | 50.0", "fp8 tables, bound | 0.250", "rvq encode", "triton greedy")) and "replaced" not in text
    drawn = [line for line in latency_figure.draw(found).axes[1].lines if len(line.get_xdata()) == 1]
    assert [line.get_ydata().tolist() for line in drawn] == [[0.25]]


def test_the_fastest_way_to_call_another_library_is_one_baseline(tmp_path):
    style.setup()
    (tmp_path / "latency").mkdir()
    pd.DataFrame([timing("sdpa_cudnn", 20.0, checked=True), timing("tq_k3v3", 5.0, checked=True)]).to_parquet(tmp_path / "latency" / "decode_attention.parquet")
    alone = blockgtq_deployment.table(blockgtq_deployment.rows(tmp_path)).markdown()
    assert "FlashInfer" not in alone and "agreed with its definition within 1e-2." in alone and "tq_k3v3 | 4.000" in alone
    ways = {"flashinfer fp16, single NHD": 15.0, "flashinfer fp16, xqa HND page 64": 10.0, "flashinfer fp8, xqa HND page 64": 8.0, "flashinfer fp8, batch NHD page 16": 9.0}
    rows = [timing(way, us, checked=True, flashinfer="0.7") for way, us in ways.items()]
    pd.DataFrame([*rows, {**rows[2], "metric": "relative error"}]).to_parquet(tmp_path / "latency" / "flashinfer.parquet")
    found = blockgtq_deployment.rows(tmp_path)
    speed = latency.speedups(found).query("fastest").set_index("method")["ratio"]
    assert speed.to_dict() == {"tq_k3v3": 2.0, "flashinfer fp8": 1.25}, "the fastest call at fp16 is what others are compared with"
    text = blockgtq_deployment.table(found).markdown()
    above, below = text.split("Microseconds of FlashInfer 0.7 by call")
    assert "| flashinfer fp16 | 10.0 |" in above and "NHD" not in above and all(f"| {way} | {us:.1f} |" in below for way, us in ways.items())
    assert "of XQA's products of fp8 within 6e-2" in text and latency_figure.draw(found).axes


def test_outputs_that_were_not_right_are_named(tmp_path):
    (tmp_path / "latency").mkdir()
    rows = [timing("sdpa_flash", 20.0, checked=True), timing("tq_k3v3", 10.0, checked=False), timing("tq_k3v3 float16", 1234.0, "encode", "rate", "GB/s", checked=True)]
    pd.DataFrame(rows[:2]).to_parquet(tmp_path / "latency" / "decode_attention.parquet")
    pd.DataFrame(rows[2:]).to_parquet(tmp_path / "latency" / "encode.parquet")
    text = blockgtq_deployment.table(blockgtq_deployment.rows(tmp_path)).markdown()
    assert "tq_k3v3 (unverified)" in text and "Every timed output agreed" not in text
    assert "encode, rate in GB/s (a GPU, 2026-11-30" in text and "| tq_k3v3 float16 | 1,234.0 |" in text


def test_claims_about_whole_steps_are_judged_once_they_are_timed(folder):
    about = [c for c in ledger.claims(folder) if c.get("rows", "").endswith(".whole") and c["paper"] == "blockgtq"]
    assert about and {ledger.judge(c, folder, "standin", {})["verdict"] for c in about} == {"no rows yet"}
    more = {"prefill_ms": 900.0, "fp16_flash_prefill_ms": 1000.0, "fp16_cudnn_prefill_ms": 700.0, "bytes/peak": 9e9, "bytes/fp16_flash_peak": 12e9}
    for quant, ms in (("blockgtq", 4.0), ("tq_mse", 3.0)):
        cells = {f"b1 t{tokens}": example(1, tokens, ms, 3.5, **more) for tokens in (131072, 524288)}
        write(folder, quant, 3.0, cells, model="random_qwen25_3b")
    found = [ledger.judge(c, folder, "standin", {}) for c in about]
    assert [f["verdict"] for f in found] == ["not reproduced", "reproduced in direction", "reproduced in direction"]
    assert found[0]["ours"] == "0.88 times the speed, 4.00 ms"
    assert found[1]["ours"] == "900 ms against 700 (cuDNN) and 1,000 (flash)"
    assert found[2]["ours"].startswith("9.0 against 12.0 GB")
