"""Sweeps in several processes: killed and started again, under every launcher, they end with the rows of an undisturbed sweep in one process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from kvq import entry, results, status, sweep
from kvq.status import State
from tests.quants import ROOT

CELL = ["model=tiny", "task=perplexity", "task.limit=6", "calib.samples=1", "calib.length=64", "bits=4", "task.data=tests/kvq/words.txt"]
AXES = ["quant=fp16,int8,int4,fp8,zero,tq_mse", "task.context=16,32,48,64"]
FOUR = ["quant=int4,int8", "task.context=32,48"]
BASIC = "import sys; from kvq.entry import main; sys.argv[0] = 'run.py'; code = main(); sys.exit(code)"
MAIN = BASIC.replace("sys.exit", "assert 'torch' not in sys.modules, 'torch in the parent'; sys.exit")


def folders(home):
    return [f"results={home}/results", f"outputs={home}/outputs", "sweep=test"]


def launch(home, *words, code=MAIN, **environment):
    environment = {**os.environ, "HOME": str(home), "CUDA_VISIBLE_DEVICES": "0,1", **environment}
    command = [sys.executable, "-c", code, "-m", *CELL, *folders(home), *words]
    said = home / f"said-{time.monotonic_ns()}"  # a file, since nobody reads a pipe while the sweep runs
    with open(said, "w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    process.said = said.read_text
    return process


def finish(process, code=0):
    assert process.wait(timeout=300) == code, process.said()
    return process.said()


def rows(home, *runs):
    """Rows by run without clocks and provenance."""
    frame = results.load(home / "results")
    frame = frame[frame.run.isin(runs)] if runs else frame
    frame = frame[~frame.metric.str.endswith("_seconds") & (frame.metric != "examples_per_second")].drop(columns=["date", "commit", "dirty"])
    frame = frame.assign(config=[json.dumps(json.loads(c)["identity"], sort_keys=True) for c in frame.config])
    return frame.sort_values(["run", "subset", "metric"], ignore_index=True)


def files(home, pattern="*"):
    return {p.name: p.stat().st_mtime_ns for p in (home / "results" / "runs").glob(pattern)}


def noted(home):
    found = [sweep.read(p) for p in (home / "outputs" / "sweeps" / "test").glob("*.json") if p.name != "plan.json"]
    return [note for note in found if note]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The 24 cells in this process, by the basic launcher, and how often the model was made."""
    from hydra.core.global_hydra import GlobalHydra

    from kvq import tiny

    home, argv = tmp_path_factory.mktemp("undisturbed"), sys.argv
    GlobalHydra.instance().clear()
    tiny.load.cache_clear()
    sys.argv = ["run.py", "-m", *CELL, *AXES, *folders(home)]
    try:
        assert entry.main() == 0
    finally:
        sys.argv = argv
    assert tiny.load.cache_info().misses == 1, "the model stays loaded between cells"
    return home


def kill_workers(home, process, enough):
    """Kill -9 all workers of a sweep once `enough` runs are finished; returns the finished files."""
    deadline = time.monotonic() + 200
    workers = ()
    while len(files(home, "*.parquet")) < enough or len(workers) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.said()
        time.sleep(0.01)
        workers = {note["pid"] for note in noted(home) if note["state"] == "running" and status._alive(note["pid"])}
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    assert "worker process was killed" in finish(process, 1)
    return files(home)


def test_a_sweep_killed_twice_ends_like_an_undisturbed_one(undisturbed, tmp_path):
    kept = []
    for enough in (5, 12):
        process = launch(tmp_path, *AXES, "hydra/launcher=joblib", "jobs=2")
        kept.append(kill_workers(tmp_path, process, enough))
        running = [note for note in noted(tmp_path) if note["state"] == "running"]
        assert {note["gpu"] for note in running} <= {"0", "1"} and {note["threads"] for note in running} <= {str(max(1, len(os.sched_getaffinity(0)) // 2))}
        states = status.states(tmp_path / "outputs" / "sweeps" / "test")
        assert {State.DONE, State.STOPPED} <= {s.state for s in states} and len(states) == 24
    assert len(kept[0]) < len(kept[1]) < 48
    assert {note["gpu"] for note in noted(tmp_path)} == {"0", "1"}, "each worker has a GPU of its own"  # one may be between two cells at a kill
    said = finish(launch(tmp_path, *AXES, "hydra/launcher=joblib", "jobs=2"))
    assert "24 of 24 cells done" in said
    ended = files(tmp_path)
    whole = {n for n in kept[1] if n.endswith(".jsonl") and n.replace(".jsonl", ".parquet") in kept[1]} | {n for n in kept[1] if n.endswith(".parquet")}
    assert all(ended[name] == kept[1][name] for name in whole), "a finished run was computed again"
    assert all(ended[name] == kept[0][name] for name in kept[0] if name.endswith(".parquet"))
    assert len(files(tmp_path, "*.parquet")) == 24 and len(ended) == 48, sorted(ended)
    assert not list((tmp_path / "outputs" / "partial").iterdir())
    pd.testing.assert_frame_equal(rows(tmp_path), rows(undisturbed))


@pytest.mark.parametrize("launcher", ["ray", "submitit_local"])
def test_other_launchers_give_the_rows_of_basic(undisturbed, tmp_path, launcher):
    said = finish(launch(tmp_path, *FOUR, f"hydra/launcher={launcher}", RAY_TMPDIR=f"/tmp/kvq-ray-{os.getpid()}"))
    assert "4 of 4 cells done" in said
    mine = rows(tmp_path)
    assert mine[mine["quant"] != "fp16"].run.nunique() == 4
    pd.testing.assert_frame_equal(mine, rows(undisturbed, *mine.run.unique()))
    assert {note["gpu"] for note in noted(tmp_path)} <= {"0", "1"} and {note["threads"] for note in noted(tmp_path)} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}


def test_two_sweeps_at_once_share_the_cells(undisturbed, tmp_path):
    both = [launch(tmp_path, *FOUR, code=BASIC) for _ in range(2)]
    codes, said = [process.wait(timeout=300) for process in both], [process.said() for process in both]
    assert set(codes) <= {0, 3} and 0 in codes, said
    assert len(files(tmp_path, "*.parquet")) == 6
    computed = [re.findall(r"run (\w{8}) on cpu", text) for text in said]
    again = [re.findall(r"run (\w{8}) is finished", text) for text in said]
    assert sum(map(len, computed)) - sum(map(len, again)) == 4, "every cell computed once, fp16 without a table"
    mine = rows(tmp_path)
    pd.testing.assert_frame_equal(mine, rows(undisturbed, *mine.run.unique()))


def test_slurm_gets_an_array_of_one_gpu_jobs(tmp_path):
    """Up to sbatch, which here keeps the script and queues nothing."""
    (tmp_path / "bin").mkdir()
    for name, does in (("sbatch", f'cp "$1" {tmp_path}/script; echo Submitted batch job 7'), ("srun", "true"), ("sacct", "true"), ("squeue", "true")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    options = ["hydra.launcher.partition=gpu", "hydra.launcher.array_parallelism=3", "hydra.launcher.setup=[source .venv/bin/activate]"]
    process = launch(tmp_path, *FOUR, "hydra/launcher=submitit_slurm", *options, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    deadline = time.monotonic() + 60
    while not (tmp_path / "script").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "script").exists(), process.said()
    script = (tmp_path / "script").read_text()
    for line in ("--array=0-3%3", "--gpus-per-node=1", "--cpus-per-task=8", "--mem=64GB", "--partition=gpu", "--time=720", "--job-name=kvq", "--signal=USR2@120"):
        assert f"#SBATCH {line}" in script, script
    assert script.index("source .venv/bin/activate") < script.index("srun") and "submitit.core._submit" in script
    submitted = list((tmp_path / "outputs" / ".submitit").rglob("*_submitted.pkl"))
    assert len(submitted) == 4


def test_a_missing_plugin_is_named_with_what_to_install(tmp_path):
    hide = "import sys; sys.modules['hydra_plugins.hydra_ray_launcher'] = None; "
    process = launch(tmp_path, *FOUR, "hydra/launcher=ray", code=hide + MAIN)
    said = finish(process, 2)
    assert "Traceback" not in said
    assert re.search(r"error: hydra/launcher=ray needs a plugin that is not installed: pip install hydra-ray-launcher==\S+ ray==\S+ \(extra `ray`", said), said


def state(where, cell, **note):
    (where / f"{sweep.key_of(cell)}.json").write_text(json.dumps({"cell": cell, "pid": 2**22 + 1, "host": "here", **note}))


def test_status_tells_every_state_with_its_reason(undisturbed, tmp_path, capsys):
    where = tmp_path / "outputs" / "sweeps" / "s"
    where.mkdir(parents=True)
    finished = noted(undisturbed)[0]
    cells = {name: ["task=niah", f"quant={name}"] for name in ("done", "failed", "stopped", "missing", "deleted")}
    plan = {"cells": {sweep.key_of(c): c for c in cells.values()}, "results": str(undisturbed / "results")}
    (where / "plan.json").write_text(json.dumps(plan))
    state(where, cells["done"], state="finished", run=finished["run"])
    state(where, cells["failed"], state="failed", run="00000001", reason="KIVI bits must be 1, 2, 3 or 4.")
    state(where, cells["stopped"], state="running", run="00000002")
    state(where, cells["deleted"], state="finished", run="00000003")
    assert status.main([str(tmp_path / "outputs")]) == 1
    said = capsys.readouterr().out
    assert "sweep s: 1 done, 1 failed, 1 stopped, 2 missing of 5" in said
    lines = [r"failed +quant=failed: KIVI bits must be", r"stopped +quant=stopped: process \d+ on here ended", r"missing +quant=missing: not started"]
    for line in (*lines, r"missing +quant=deleted: its rows"):
        assert re.search(line, said), said
    table = pd.read_csv(where / "table.csv")
    assert list(table.run) == [finished["run"]] and {"bits_stored", "bits_total", "value", "fp16"} <= set(table)
    assert status.main([str(undisturbed / "outputs")]) == 0 and "24 done of 24" in capsys.readouterr().out
    (where / "plan.json").write_text("{")
    assert status.main([str(tmp_path / "outputs")]) == 1 and "no readable plan" in capsys.readouterr().err
    assert status.main([str(tmp_path / "nowhere")]) == 2


def test_what_is_computed_names_the_sweep_not_where_or_how():
    words = ["-m", "quant=a,b", "bits=1"]
    assert sweep.name_of(words) == sweep.name_of([*words, "results=/x", "hydra/launcher=joblib", "hydra.launcher.n_jobs=3", "jobs=4", "logger=wandb", "force=true"])
    assert sweep.name_of(words) != sweep.name_of([*words, "seed=1"]) and Path(sweep.name_of(words)).name


def test_an_unexpected_error_is_a_sentence_and_the_sweep_goes_on(tmp_path, monkeypatch, capsys):
    from hydra.core.global_hydra import GlobalHydra

    from kvq.tasks.perplexity import Perplexity

    real = Perplexity.run

    def breaks(self, lm, examples):
        if len(examples) and self.context == 32:
            raise IndexError("index 7 is out of range")
        return real(self, lm, examples)

    monkeypatch.setattr(Perplexity, "run", breaks)
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["run.py", "-m", *CELL, "quant=fp16", "task.context=32,48", *folders(tmp_path)])
    assert entry.main() == 2
    err = capsys.readouterr().err
    assert re.search(r"error: task.context=32: unexpected IndexError: index 7 is out of range at tests.*:\d+\.", err) and "Traceback" not in err
    assert "1 of 2 cells done, 1 failed" in err and "Traceback" in next(n for n in noted(tmp_path) if n["state"] == "failed")["traceback"]


def test_a_sweep_without_a_plan_does_not_pass_for_done(tmp_path, monkeypatch, capsys):
    from hydra.core.global_hydra import GlobalHydra

    (tmp_path / "outputs" / "sweeps").mkdir(parents=True)
    (tmp_path / "outputs" / "sweeps" / "test").write_text("in the way")
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["run.py", "-m", *CELL, "quant=fp16", *folders(tmp_path)])
    with pytest.warns(UserWarning, match="Plan.on_multirun_start raised"):
        assert entry.main() == 2
    assert "sweeps/test cannot be written" in capsys.readouterr().err


def test_two_processes_share_one_cell_and_one_of_them_writes_its_rows(tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    for home in (whole, shared):
        home.mkdir()
    one = ["quant=int4,fp16", "task.context=32", "task.batch_size=2"]
    finish(launch(whole, *one, code=BASIC))
    finish(launch(shared, *one, "parts=2", "part=0,1", "hydra/launcher=joblib", "jobs=2"))
    assert len(list((shared / "results/runs").glob("*.parquet"))) == 2
    pd.testing.assert_frame_equal(rows(whole), rows(shared))
    assert not list((shared / "outputs/partial").iterdir())
