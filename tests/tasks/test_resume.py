"""A run killed in the middle goes on: finished examples are kept to the byte, and the rows are those of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
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


DIES = """
import os, signal, sys
from pathlib import Path
from kvq import entry, predictions

folder, codec, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sys.argv = ["run.py", *sys.argv[4:]]
write = predictions.append

def until(path, records):
    fp16 = not list(folder.glob("results/runs/*.parquet"))  # the reference is computed first
    for n, record in enumerate(records):
        if n == count and fp16 == (codec == "fp16"):
            os.kill(os.getpid(), signal.SIGKILL)
        yield record

predictions.append = lambda path, records: write(path, until(path, records))
sys.exit(entry.main())
"""
"""run.py that kills itself with -9 once `count` records of the named half are on disk and the next one is computed: the moment is always the same."""


def start(folder, cell, *dies):
    program = ["-c", DIES, str(folder), *map(str, dies)] if dies else ["run.py"]
    words = ["model=tiny", "quant=int4", *cell, f"results={folder}/results", f"outputs={folder}/outputs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *program, *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_after(folder, codec, count, cell=NIAH):
    """Run the cell until its death after `count` records of the named half; return those records."""
    run = start(folder, cell, codec, count)
    said = run.communicate(timeout=300)[0]
    assert run.returncode == -signal.SIGKILL, said
    (file,) = folder.glob("outputs/partial/*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == count and all(line.endswith("\n") for line in lines)
    return [line.rstrip("\n") for line in lines]


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
    compare(finish(broken), finish(whole), {"fp16": early, "int4": late})


@pytest.mark.parametrize("task", OTHERS)
def test_every_task_goes_on_where_it_was_killed(task, tmp_path):
    cell = [f"task={task}", *OTHERS[task]]
    lines = kill_after(tmp_path / "broken", "int4", 5, cell)
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
