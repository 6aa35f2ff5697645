"""A run killed in the middle goes on: finished examples are kept to the byte, and the rows are those of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
NIAH = ["task=niah", "task.lengths=[768]", "task.depths=2", "task.limit=2", "task.batch_size=1", "task.max_new_tokens=24"]
OTHERS = {
    "longbench": ["task.subsets=[qasper,trec]", "task.limit=12", "task.context=640", "task.max_new_tokens=24"],
    "perplexity": ["task.context=512", "task.limit=24", "task.stride=256", "task.batch_size=2"],
    "choices": ["task.limit=24", "task.lines=40", "task.batch_size=2"],
    "aime": ["task.limit=6", "task.repeats=4", "task.max_new_tokens=24", "task.batch_size=3"],
    "gsm8k": ["task.limit=24", "task.num_fewshot=2", "task.max_new_tokens=24"],
    "fewshot": ["task.tasks=[hellaswag]", "task.num_fewshot=2", "task.limit=24"],
}
"""The other ways to an answer: batches, likelihoods, samples, lm-eval's requests, shared beginnings; 24 examples each."""
VARY = ["date", "commit", "dirty"]
AS_RUN = ["examples_per_second", "reused_tokens", "batch_size"]


def start(folder, cell):
    words = ["model=tiny", "quant=int4", *cell, f"results={folder}/results", f"outputs={folder}/outputs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "run.py", *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def whole_lines(folder, codec):
    """Finished records of a running cell: its partial file is told apart by whether the fp16 rows exist already."""
    if bool(list(folder.glob("results/runs/*.parquet"))) != (codec != "fp16"):
        return []
    files = list(folder.glob("outputs/partial/*.jsonl"))
    text = files[0].read_text() if files else ""
    return text[: text.rfind("\n") + 1].splitlines()


def kill_after(folder, codec, count, cell=NIAH):
    """Start the cell, kill -9 it once `count` records of the named half are on disk; return those records."""
    run = start(folder, cell)
    deadline = time.monotonic() + 300
    while len(whole_lines(folder, codec)) < count:
        assert run.poll() is None and time.monotonic() < deadline, run.stdout.read()
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    return whole_lines(folder, codec)


def finish(folder, cell=NIAH):
    run = start(folder, cell)
    said = run.communicate(timeout=300)[0]
    assert run.returncode == 0, said
    files = {json.loads(pd.read_parquet(f).config[0])["identity"]["quant"]["name"]: f for f in folder.glob("results/runs/*.parquet")}
    assert set(files) == {"fp16", "int4"} and not list(folder.glob("outputs/partial/*"))
    return files


def test_killed_and_restarted_equals_undisturbed(tmp_path):
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    early = kill_after(broken, "fp16", 5)
    late = kill_after(broken, "int4", 9)
    assert 5 <= len(early) < 24 and 9 <= len(late) < 24, "the kill came too late to mean anything"
    compare(finish(broken), finish(whole), {"fp16": early, "int4": late})


@pytest.mark.parametrize("task", OTHERS)
def test_every_task_goes_on_where_it_was_killed(task, tmp_path):
    cell = [f"task={task}", *OTHERS[task]]
    lines = kill_after(tmp_path / "broken", "int4", 5, cell)
    assert 5 <= len(lines) < 24, "the kill came too late to mean anything"
    batch = next((int(word.split("=")[1]) for word in cell if word.startswith("task.batch_size=")), 2)
    whole = lines[: len(lines) - (batch - 1)]  # what a kill left of a batch is done again with the rest of it
    compare(finish(tmp_path / "broken", cell), finish(tmp_path / "whole", cell), {"int4": whole})


def alike(a, b) -> bool:
    """Equal but for the last bits of numbers: after a restart other rows meet in a batch."""
    if isinstance(a, str) and isinstance(b, str) and a.startswith("[["):
        a, b = json.loads(a), json.loads(b)  # likelihoods as text
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == pytest.approx(b, abs=1e-4) if isinstance(a, float) else a == b


def compare(mine, theirs, before):
    """The files of a killed and a whole run hold the same; `before`: the records that were on disk at the kill, by quantizer."""
    for name, lines in before.items():
        kept = mine[name].with_suffix(".jsonl").read_text().splitlines()
        assert len(kept) == 24 and set(lines) <= set(kept), "a finished example was computed again"  # records hold their own seconds
        assert mine[name].name == theirs[name].name
        records = [[json.loads(line) for line in files[name].with_suffix(".jsonl").read_text().splitlines()] for files in (mine, theirs)]
        for a, b in zip(*records, strict=True):
            assert a.pop("check") and b.pop("check")  # of the whole line, seconds included
            assert {k for k in a.pop("usage") if not k.endswith("_seconds")} == {k for k in b.pop("usage") if not k.endswith("_seconds")}
            assert alike(a, b), (a, b)
        rows = [pd.read_parquet(files[name]) for files in (mine, theirs)]
        for frame in rows:
            frame["config"] = frame.config.map(lambda c: json.dumps(json.loads(c)["identity"], sort_keys=True))
        rows = [f[~f.metric.str.endswith("_seconds") & ~f.metric.isin(AS_RUN)].drop(columns=VARY).reset_index(drop=True) for f in rows]
        pd.testing.assert_frame_equal(*rows)
