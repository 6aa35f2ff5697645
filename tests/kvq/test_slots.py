"""Places for parallel processes: as many as asked for, each with its own GPU and its share of the cores, free again after kill -9."""

import os
import signal
import subprocess
import sys

import pytest

from kvq import slots
from kvq.errors import Refusal
from tests.quants import ROOT

TAKE = """
import os, sys, types, pathlib, time
sys.modules["torch"] = types.SimpleNamespace(set_num_threads=lambda n: None)
from kvq import slots
place = slots.take(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
assert place == slots.take(pathlib.Path(sys.argv[1]), int(sys.argv[2]), 99), "kept from job to job"
print(place, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"], flush=True)
sys.stdin.readline()
"""


def start(folder, jobs, prefer, gpus):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
    return subprocess.Popen([sys.executable, "-c", TAKE, str(folder), str(jobs), str(prefer)], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_each_process_has_a_gpu_and_cores_of_its_own(tmp_path):
    running = [start(tmp_path, 3, job, "4,5,7") for job in (0, 1, 5)]
    told = [process.stdout.readline().split() for process in running]
    assert [t[:2] for t in told] == [["0", "4"], ["1", "5"], ["2", "7"]]
    assert {t[2] for t in told} == {str(max(1, len(os.sched_getaffinity(0)) // 3))}
    waiting = start(tmp_path, 3, 0, "4,5,7")
    os.kill(running[1].pid, signal.SIGKILL)
    running[1].wait()
    assert waiting.stdout.readline().split()[:2] == ["1", "5"]
    for process in (running[0], running[2], waiting):
        process.communicate("done\n", timeout=20)
        assert process.returncode == 0


def test_more_places_than_gpus_share_them_and_none_is_none(tmp_path):
    running = [start(tmp_path / "a", 2, 1, "3"), start(tmp_path / "b", 2, 0, "")]
    assert [process.stdout.readline().split(" ")[:2] for process in running] == [["1", "3"], ["0", ""]]
    for process in running:
        process.communicate("done\n", timeout=20)


@pytest.mark.parametrize("jobs", [0, -1, True, 1.5])
def test_no_place_is_refused(tmp_path, jobs):
    with pytest.raises(Refusal, match=f"jobs={jobs} is not a whole number from 1 on"):
        slots.take(tmp_path, jobs, 0)


def test_gpus_are_listed_without_cuda(monkeypatch, tmp_path):
    for name in ("CUDA_VISIBLE_DEVICES", slots.GPUS):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU-aa\necho GPU-bb\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert slots.visible_gpus() == ["GPU-aa", "GPU-bb"]
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert slots.visible_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv(slots.GPUS, "0,1")
    assert slots.visible_gpus() == ["0", "1"], "a worker that submitit hid them from"
