"""A run killed in the middle goes on: finished examples are kept to the byte, and the rows are those of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
CELL = [
    "model=tiny", "quant=int4", "task=niah", "task.lengths=[768]", "task.depths=2", "task.limit=2", "task.batch_size=1", "task.max_new_tokens=24",
]  # fmt: skip
VARY = ["date", "commit", "dirty"]


def start(folder):
    words = [*CELL, f"results={folder}/results", f"outputs={folder}/outputs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "run.py", *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def whole_lines(folder, codec):
    """Finished records of a running cell: its partial file is told apart by whether the fp16 rows exist already."""
    if bool(list(folder.glob("results/runs/*.parquet"))) != (codec != "fp16"):
        return []
    files = list(folder.glob("outputs/partial/*.jsonl"))
    text = files[0].read_text() if files else ""
    return text[: text.rfind("\n") + 1].splitlines()


def kill_after(folder, codec, count):
    """Start the cell, kill -9 it once `count` records of the named half are on disk; return those records."""
    run = start(folder)
    deadline = time.monotonic() + 300
    while len(whole_lines(folder, codec)) < count:
        assert run.poll() is None and time.monotonic() < deadline, run.stdout.read()
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    return whole_lines(folder, codec)


def finish(folder):
    run = start(folder)
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
    mine, theirs = finish(broken), finish(whole)
    for name, lines in (("fp16", early), ("int4", late)):
        kept = mine[name].with_suffix(".jsonl").read_text().splitlines()
        assert len(kept) == 24 and set(lines) <= set(kept), "a finished example was computed again"  # records hold their own seconds
        assert mine[name].name == theirs[name].name
        records = [[json.loads(line) for line in files[name].with_suffix(".jsonl").read_text().splitlines()] for files in (mine, theirs)]
        for a, b in zip(*records, strict=True):
            assert a.pop("check") and b.pop("check")  # of the whole line, seconds included
            seconds = [{k for k in r.pop("usage") if not k.endswith("_seconds")} for r in (a, b)]
            assert a == b and seconds[0] == seconds[1]
        rows = [pd.read_parquet(files[name]) for files in (mine, theirs)]
        for frame in rows:
            frame["config"] = frame.config.map(lambda c: json.dumps(json.loads(c)["identity"], sort_keys=True))
        rows = [f[~f.metric.str.endswith("_seconds") & (f.metric != "examples_per_second")].drop(columns=VARY).reset_index(drop=True) for f in rows]
        pd.testing.assert_frame_equal(*rows)
