"""The record of a sweep: which cells it has and what became of each, one small file per cell, written by whichever process runs it.

    <outputs>/sweeps/<sweep>/plan.json            every cell that was ever asked for under this name, by the hash of its overrides
    <outputs>/sweeps/<sweep>/<hash>.json          the cell's last state: running, finished, failed (with reason), claimed, estimated

A state of `running` is true only while its process lives; see kvq.status. No scheduler: Hydra's launchers decide who runs what.
"""

import datetime
import hashlib
import json
import os
import traceback
from pathlib import Path

from kvq import folder as writing
from kvq.claim import HOST
from kvq.results import replace

ASIDE = ("results", "outputs", "calibrations", "force", "sweep", "logger", "jobs", "dry_run", "fit", "memo", "hydra/")
"""Overrides that do not say what is computed: a sweep resumed with other folders or another launcher is the same sweep."""


def essence(overrides: list[str]) -> list[str]:
    """The overrides that tell cells apart."""
    return [o for o in overrides if not o.lstrip("+~").startswith((*(f"{a}=" for a in ASIDE), *(f"{a}." for a in ASIDE), "hydra/", "hydra."))]


def name_of(words: list[str]) -> str:
    """A sweep's default name: a hash of its command line."""
    return "s" + key_of(sorted(essence([w for w in words if not w.startswith("-")])))  # a letter first: Hydra would read 1e8be7a6 as a number


def key_of(words: list[str]) -> str:
    """A cell's key, from its essential overrides."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]


def folder(outputs: str | Path, sweep: str) -> Path:
    return Path(outputs) / "sweeps" / str(sweep)


class Note:
    """The state file of one cell, written by the process that runs it."""

    def __init__(self, where: Path, overrides: list[str]):
        cell = essence(overrides)
        self.path = where / f"{key_of(cell)}.json"
        self.state = {"cell": cell, "pid": os.getpid(), "host": HOST, "started": now()}

    def write(self, state: str, **more) -> None:
        place = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": os.environ.get("OMP_NUM_THREADS")}
        self.state.update(state=state, ended=None if state == "running" else now(), **place, **more)
        writing.make(self.path.parent)
        write(self.path, self.state)

    def failed(self, reason: str, error: BaseException) -> None:
        self.write("failed", reason=reason, traceback="".join(traceback.format_exception(error)))


def read(path: Path) -> dict | None:
    """A state or plan; None if it is absent or damaged (its cell then counts as not started, and is skipped or resumed by content)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    except (FileNotFoundError, ValueError):
        return None


def write(path: Path, state: dict) -> None:
    replace(path, lambda temporary: temporary.write_text(json.dumps(state, indent=1), encoding="utf-8"))


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
