"""The command of a GPU session: every cell of its sweeps, each in a process of its own, none lost when another dies or time runs out."""

import subprocess
import sys

import pandas as pd
import pytest

from kvq import bench_decode

LITTLE = ["size=fast", "quant.key.piece=128", "task.pairs=[[1,32]]"]


def test_cells_are_those_of_the_sweeps():
    vector = bench_decode.cells("gsrq_latency", [])
    assert len(vector) == 4 and all(words[:2] == ["experiment=gsrq_latency", "hydra.mode=RUN"] for words in vector)
    assert {tuple(words[3:5]) for words in vector} == {(f"bits={b}", f"quant.key.piece={p}") for b in ("1", "0.75") for p in ("128", "32")}
    assert [words[-1] for words in bench_decode.cells("gsrq_latency", ["bits=2", "quant.key.piece=32"])] == ["quant.key.piece=32"]


def test_a_cell_has_rows(tmp_path, capfd):
    words = ["gsrq_latency", *LITTLE, "bits=1", f"outputs={tmp_path}/outputs", f"results={tmp_path}/results"]
    assert bench_decode.main([*words, "--scratch", "none"]) == 0
    (path,) = (tmp_path / "results" / "runs").glob("*.parquet")
    assert {"b1 t32 eager emulated"} <= set(pd.read_parquet(path)["subset"]) and "done in" in capfd.readouterr().out


@pytest.fixture
def started(monkeypatch):
    """The words of every process that would start; bits=0.75 fails."""
    seen = []

    class Process:
        def __init__(self, command, **options):
            assert command[:2] == [sys.executable, "run.py"]
            seen.append(command[2:])
            self.returncode = int("bits=0.75" in command)

        def wait(self, timeout=None):
            return self.returncode

    monkeypatch.setattr(subprocess, "run", Process)
    monkeypatch.setattr(subprocess, "Popen", Process)
    return seen


def test_all_are_compiled_first_and_a_failure_stops_nothing(started, capsys, tmp_path):
    assert bench_decode.main(["gsrq_latency", "--scratch", str(tmp_path)]) == 1
    short, long = started[:4], started[4:]
    assert len(long) == 4 and all(set(bench_decode.LITTLE) <= set(words) for words in short) and not any("force=true" in words for words in long)
    assert len({words[-1] for words in short}) == 4, "short cells share no results folder"
    said = capsys.readouterr().out
    assert said.count("done in") == 2 and said.count("failed (1)") == 2 and "2 of 4 short cells failed" in said


def test_when_time_is_over_cells_are_named(started, capsys):
    assert bench_decode.main(["gsrq_latency", "--scratch", "none", "--minutes", "0"]) == 1
    assert not started and capsys.readouterr().out.count("not begun") == 4
