"""Whole steps are drawn from results/latency alone, beside kernels; where there are none one sentence says so."""

import json
import shutil
from pathlib import Path

import pytest

from experiments import blockgtq_deployment, gsrq_latency, gsrq_memory, latency, style
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


def write(folder, quant, bits, examples, how="graph kernels", model="random_llama31_8b"):
    """One run; examples: subset without `how` to metrics."""
    run = results.run_id({"quant": quant, "bits": bits, "how": how, "model": model})
    options = {"model": {"name": model}, "task": {"how": how}, "calib": {}, "prefill": "quantized", "seed": 0, "quant": {"key": {"piece": 128, "bits": bits}}}
    common = {"run": run, "model": model, "quant": quant, "task": "latency", "data": "synthetic", "calib": "text", "bits": bits, "bits_stored": bits, "bits_total": bits,
              "encoded_tokens": 10, "stderr": 0.0, "n": 1, "seed": 0, "config": json.dumps(options), "commit": "c", "dirty": False,
              "date": "2026-11-30T00:00:00Z", "device": "a GPU", "torch": "", "transformers": ""}  # fmt: skip
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


def test_measured_peaks_join_the_memory_figure(folder):
    assert "has been timed on a GPU yet" in gsrq_memory.table(gsrq_memory.rows(folder)).markdown()
    more = {"bytes/peak": 18e9, "bytes/fp16_flash_peak": 20e9}
    write(folder, "gsrq", 0.75, {f"b{b} t1024": example(b, 1024, 6.0, 5.0, **more) for b in (8, 64)} | {"b1 t8192": example(1, 8192, 6.0, 7.0, **more)})
    rows = gsrq_memory.rows(folder)
    assert rows[rows["arm"] == "measured GSRQ"][["batch", "value"]].to_numpy().tolist() == [[8, 18.0], [64, 18.0]]
    assert "measured FP16" in gsrq_memory.table(rows).markdown() and gsrq_memory.draw(rows).axes
