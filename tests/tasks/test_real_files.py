"""Files made by others, end to end through run.py by their local paths: LongBench multi_news, AIME 2024, WikiText-2."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("KVQ_SHARED_DATA", ROOT.parent / "shared" / "data"))
CELLS = {
    "longbench": ("longbench_multi_news.jsonl", ["task.limit=2", "task.context=480", "task.max_new_tokens=16"], {"multi_news"}),
    "aime": ("aime24.jsonl", ["task.limit=3", "task.repeats=2", "task.max_new_tokens=16", "task.batch_size=auto"], {"aime24"}),
    "perplexity": ("wikitext2_test.raw", ["task.limit=4", "task.context=256", "task.stride=128"], {"text"}),
    "niah": ("wikitext2_test.raw", ["task.limit=1", "task.depths=2", "task.lengths=[1024]", "task.subsets=[single]", "task.max_new_tokens=8"], {"single@1024"}),
}


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is absent; set KVQ_SHARED_DATA to the folder with the real test inputs")
    return SHARED / name


@pytest.mark.parametrize("task", CELLS)
def test_a_users_file_end_to_end(task, tmp_path):
    """On a small model by another author, which knows nothing of these tasks: the pipeline is tested, not the score."""
    name, words, subsets = CELLS[task]
    model = "model=standin" if task in ("aime", "niah") else f"model.path={shared('models/stories260K')}"
    words = [*(["model=local"] if task in ("longbench", "perplexity") else []), model, "quant=int4", f"task={task}", f"task.data={shared(name)}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "run.py", *words, f"results={tmp_path}/results", f"outputs={tmp_path}/outputs"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {pd.read_parquet(f)["quant"][0]: f for f in (tmp_path / "results" / "runs").glob("*.parquet")}
    frame = pd.read_parquet(files["int4"])
    scored = frame[~frame.subset.isin(["run", "average"])]
    assert set(files) == {"fp16", "int4"} and set(scored.subset) == subsets and (frame.encoded_tokens > 0).all()
    metrics = set(frame.metric)
    main = "loss" if task == "perplexity" else "score"
    assert {main, f"{main}_fp16", f"{main}_minus_fp16", "fp16_too_weak", "examples_per_second", "batch_size", "reused_tokens"} <= metrics
    assert all(math.isfinite(v) for v in frame.value)
    records = [json.loads(line) for line in files["int4"].with_suffix(".jsonl").read_text().splitlines()]
    if task == "longbench":
        assert all(r["truncated"] == "middle" and r["target"][0] for r in records)
    if task == "aime":
        assert len(records) == 6 and {r["target"] for r in records} <= set(range(1000))
