"""Claims: one holder at a time among processes that start together, none left behind by kill -9, other machines told apart by heartbeat."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kvq import claim
from kvq.claim import Busy, Claim
from kvq.errors import Refusal
from tests.quants import ROOT

WORK = """
import sys, time, pathlib
from kvq.claim import Busy, Claim
folder, done = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
print("ready", flush=True); sys.stdin.readline()
for n in range(40):
    try:
        with Claim(folder, f"run{n}") as mine:
            if not (done / str(n)).exists():
                with open(done / f"{n}.open", "x"): time.sleep(0.002)   # "x" raises if another process is inside
                (done / str(n)).write_text("1"); (done / f"{n}.open").unlink(); mine.check()
    except Busy: pass
"""


def start(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_start_together_never_share_a_run(tmp_path):
    claims, done = tmp_path / "claims", tmp_path / "done"
    done.mkdir()
    running = [start(WORK, claims, done) for _ in range(5)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert sorted(map(int, os.listdir(done))) == list(range(40)) and os.listdir(claims) == []


HOLD = "import sys, time\nfrom kvq.claim import Claim\nwith Claim(sys.argv[1], 'a'): print('held', flush=True); time.sleep(60)"


def test_a_killed_holder_frees_the_run_at_once(tmp_path):
    holder = start(HOLD, tmp_path)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Busy, match=f"process {holder.pid} on {claim.HOST}"), Claim(tmp_path, "a"):
        pass
    assert claim.held(tmp_path, "a")["pid"] == holder.pid
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert claim.held(tmp_path, "a") is None and (tmp_path / "a.claim").exists()
    with Claim(tmp_path, "a") as mine:
        mine.check()
    assert os.listdir(tmp_path) == []


def test_waiting_gets_the_run_when_its_holder_is_gone(tmp_path, capsys):
    holder = start(HOLD.replace("60", "1"), tmp_path)
    assert holder.stdout.readline() == "held\n"
    begun = time.monotonic()
    with Claim(tmp_path, "a", wait=True):
        assert time.monotonic() - begun > 0.5
    assert holder.wait() == 0 and f"being computed by process {holder.pid}" in capsys.readouterr().out


def foreign(tmp_path, age):
    """A claim of another machine, whose kernel lock is not visible here, last touched `age` seconds ago."""
    file = tmp_path / "a.claim"
    file.write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": 0.0, "token": "theirs"}))
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_another_machine_is_believed_while_its_heart_beats(tmp_path):
    foreign(tmp_path, claim.STALE - 30)
    with pytest.raises(Busy, match="process 7 on elsewhere"), Claim(tmp_path, "a"):
        pass
    assert claim.held(tmp_path, "a")["host"] == "elsewhere" and os.listdir(tmp_path) == ["a.claim"]
    foreign(tmp_path, claim.STALE + 30)
    assert claim.held(tmp_path, "a") is None
    with Claim(tmp_path, "a") as mine:
        mine.check()


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "BEAT", 0.02)
    with Claim(tmp_path, "a"):
        os.utime(tmp_path / "a.claim", (1, 1))
        time.sleep(0.3)
        assert (tmp_path / "a.claim").stat().st_mtime > 1


def test_a_claim_that_was_taken_over_writes_nothing(tmp_path):
    with Claim(tmp_path, "a") as mine:
        foreign(tmp_path, 0)
        with pytest.raises(Refusal, match="taken over by process 7 on elsewhere"):
            mine.check()
    assert (tmp_path / "a.claim").exists(), "the new holder's claim is not ours to remove"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\x00\xff", "7"])
def test_a_damaged_claim_is_waited_out_and_replaced(tmp_path, text):
    file = tmp_path / "a.claim"
    file.write_text(text)
    with pytest.raises(Busy), Claim(tmp_path, "a"):
        pass
    os.utime(file, (1, 1))
    with Claim(tmp_path, "a") as mine:
        mine.check()
