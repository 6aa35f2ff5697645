"""Campaigns: the cells of several experiments once each, a pool that outlives its workers and keeps heavy cells apart, and started again goes on."""

import inspect
import os
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch

from kvq import batches, campaign, entry
from kvq.errors import Refusal
from tests.quants import ROOT


def test_cells_of_several_experiments_once_each_long_ones_first():
    found = campaign.cells(["suites", "panel"], ["size=gpu"])
    alone = campaign.cells(["suites"], ["size=gpu"])
    assert len(alone) == 80 and len(found) == 80 + 6 * 4 * 2
    tasks = [campaign._task(cell) for cell in found]
    assert tasks == sorted(tasks, key=campaign.SLOWEST.index) and all("size=gpu" in cell for cell in found)
    assert len({tuple(cell) for cell in found}) == len(found)
    assert len(campaign.cells([], [])) > 500
    assert not campaign.cells(["gsrq_latency"], []), "what is timed must not share the machine"
    with pytest.raises(Refusal, match="there is no experiment sweet; choose from: .*beam, .*suites"):
        campaign.cells(["suites", "sweet"], [])


def pretend(pipe, name, folders, log, gpu, threads):
    """Stands in for campaign.work: says what it began and ended, does what its cell says."""
    while cell := campaign._next(pipe):
        with open(log.parent / "events", "a") as stream:
            stream.write(f"+ {gpu} {cell[0]}\n")
        if "die" in cell:
            os._exit(9)
        time.sleep(0.1)
        with open(log.parent / "events", "a") as stream:
            stream.write(f"- {gpu} {cell[0]}\n")
        full = "full" in cell and not (log.parent / "once").exists()
        if full:
            (log.parent / "once").touch()
        pipe.send("2 x 9 tokens do not fit in memory: lower it" if full else "busy" if "busy" in cell else "no such rate" if "bad" in cell else "")


@pytest.fixture
def pool(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "work", pretend)
    made = []

    def make(**options):
        made.append(campaign.Pool(where=tmp_path, folders=[], **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_killed_worker_costs_its_cell_and_no_other(pool):
    cells = [["task=niah", str(n)] for n in range(3)] + [["task=aime", "die"], ["task=aime", "bad"], ["task=aime", "busy"]] + [["task=aime", str(n)] for n in range(4)]
    ended = pool(jobs=2, heavy=2, gpus=[]).run(cells, time.monotonic() + 60)
    assert len(ended[""]) == 7 and ended["busy"] == [["task=aime", "busy"]] and ended["no such rate"] == [["task=aime", "bad"]]
    (killed,) = [cells for reason, cells in ended.items() if "exit code 9" in reason]
    assert killed == [["task=aime", "die"]]


def test_heavy_cells_are_spread_over_the_gpus(pool, tmp_path):
    cells = [["task=longbench", str(n)] for n in range(6)] + [["task=aime", str(n)] for n in range(6)]
    ended = pool(jobs=4, heavy=1, gpus=["a", "b"]).run(cells, time.monotonic() + 60)
    assert len(ended[""]) == 12
    load, gpus = Counter(), set()
    for sign, gpu, task in map(str.split, (tmp_path / "events").read_text().splitlines()):
        gpus.add(gpu)
        load[gpu] += (task == "task=longbench") * (1 if sign == "+" else -1)
        assert load[gpu] <= 1, "two heavy cells on one GPU"
    assert gpus == {"a", "b"}


def test_a_cell_that_found_its_gpu_full_is_computed_again_alone(pool, tmp_path):
    cells = [["task=aime", str(n)] for n in range(6)] + [["task=aime", "full"]]
    ended = pool(jobs=4, heavy=4, gpus=["a", "b"]).run(cells, time.monotonic() + 60)
    assert ended == {"": ended[""]} and sorted(map(tuple, ended[""])) == sorted(map(tuple, cells))
    events = (tmp_path / "events").read_text().splitlines()
    assert [line[0] for line in events[-2:]] == ["+", "-"] and len(events) == 2 * 8, "alone, after all others"
    said = [entry.explain(torch.OutOfMemoryError("CUDA out of memory. Tried")), inspect.getsource(batches)]
    assert all(any(word in sentence for word in campaign.CROWDED) for sentence in said)


def test_what_time_does_not_allow_is_left(pool):
    ended = pool(jobs=1, heavy=1, gpus=[]).run([["task=aime", str(n)] for n in range(500)], time.monotonic() + 8)
    assert ended["late"] and len(ended["late"]) + len(ended.get("", [])) == 500


def start(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", "kvq.campaign", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_a_campaign_goes_on_where_it_ended(tmp_path):
    words = ["blockgtq_energy", "size=fast", f"results={tmp_path}/results", f"outputs={tmp_path}/outputs", "--jobs", "1"]
    first = start(*words)
    assert first.returncode == 0 and "1 of 1 cells done, 0 failed, 0 left" in first.stderr, first.stderr
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "results/runs").iterdir()}
    assert len(files) == 4 and start(*words).returncode == 0
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "results/runs").iterdir()}, "a finished run was computed again"
    told = subprocess.run([sys.executable, "-m", "kvq.status", f"{tmp_path}/outputs"], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0 and "1 done of 1" in told.stdout
    (tmp_path / "cells").write_text(start("blockgtq_energy", "size=fast", "--list").stdout)
    again = start("--cells", f"{tmp_path}/cells", *words[2:])
    assert again.returncode == 0 and "1 of 1 cells done" in again.stderr and files.keys() == set((tmp_path / "results/runs").iterdir())
    absent = start("--cells", f"{tmp_path}/none")
    assert absent.returncode == 2 and "there is no file" in absent.stderr
    wrong = start("blockgtq_energy", "size=small")
    assert wrong.returncode == 2 and "there is no size=small" in wrong.stderr and "Traceback" not in wrong.stderr
