"""The claim of a run: at most one process, on any machine that shares the folder, computes it and writes its files.

Two files per claim. `<run>.lock` is locked by the kernel (flock) and so is free the moment its holder dies, by kill -9 as well.
`<run>.claim` names the holder and appears by a hard link, which is atomic over NFS too, where flock may not reach other machines; its
holder touches it every BEAT seconds, and a claim of another machine that was not touched for STALE seconds is taken over.
"""

import json
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from kvq import folder
from kvq.errors import Refusal

BEAT, STALE = 20.0, 180.0
"""Seconds between heartbeats, and without one until another machine's claim counts as abandoned."""
HOST = socket.gethostname()


class Busy(Exception):
    """Another process holds the claim; the message says which."""


@dataclass
class Claim:
    """`with Claim(folder, run): ...` for as long as the run is computed. Raises Busy at once, or waits with `wait=True`; Refusal if the folder cannot be written."""

    folder: Path
    run: str
    wait: bool = False

    def __post_init__(self):
        self.folder = Path(self.folder)
        self._file, self._lock = self.folder / f"{self.run}.claim", FileLock(self.folder / f"{self.run}.lock")

    def __enter__(self) -> "Claim":
        folder.make(self.folder)
        said = False
        while True:
            try:
                self._take()
                break
            except Busy as busy:
                if not self.wait:
                    raise
                if not said:
                    print(f"run {self.run} is being computed by {busy}; waiting for it", flush=True)
                    said = True
                time.sleep(0.2)
        self._stop = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._mine():
            self._file.unlink(missing_ok=True)
        self._drop_lock()

    def check(self) -> None:
        """Raise Refusal if another machine took the claim over because this one did not stir for STALE seconds."""
        if not self._mine():
            raise Refusal(f"run {self.run} was taken over by {describe(owner(self._file))}; nothing was written here.")

    def _take(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise Busy(describe(owner(self._file))) from None
        self._token = uuid.uuid4().hex
        draft = self._file.with_suffix(f".{self._token}")
        try:
            draft.write_text(json.dumps({"pid": os.getpid(), "host": HOST, "since": time.time(), "token": self._token}))
            held = owner(self._file)
            if held and held["host"] != HOST and _age(self._file, draft) < STALE:
                raise Busy(describe(held))
            if self._file.exists():  # its holder is dead: we have its lock, or it has been silent for long; one taker wins the rename
                os.rename(self._file, draft.with_suffix(".old"))
                draft.with_suffix(".old").unlink()
            os.link(draft, self._file)
        except (FileExistsError, FileNotFoundError):
            self._drop_lock()
            raise Busy(describe(owner(self._file))) from None
        except BaseException:
            self._drop_lock()
            raise
        finally:
            draft.unlink(missing_ok=True)

    def _drop_lock(self) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)  # before the release: filelock tries again on a lock file without a name
        self._lock.release()

    def _mine(self) -> bool:
        held = owner(self._file)
        return held is not None and held["token"] == self._token

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                os.utime(self._file)
            except OSError:
                return


def owner(file: Path) -> dict | None:
    """{pid, host, since, token} of a claim file, None if there is none."""
    try:
        held = json.loads(file.read_text())
        return held if {"pid", "host", "since", "token"} <= set(held) else {"pid": 0, "host": "?", "since": 0.0, "token": ""}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError):
        return {"pid": 0, "host": "?", "since": 0.0, "token": ""}


def describe(held: dict | None) -> str:
    return f"process {held['pid']} on {held['host']}" if held else "another process"


def held(folder: Path, run: str) -> dict | None:
    """The live owner of a run, None if nobody computes it. Looks only; a claim left by a killed process is not live."""
    file, lock = Path(folder) / f"{run}.claim", Path(folder) / f"{run}.lock"
    found = owner(file)
    if found is None:
        return None
    if found["host"] != HOST:
        try:
            return found if time.time() - file.stat().st_mtime < STALE else None
        except FileNotFoundError:
            return None
    if not lock.exists():
        return None
    probe = FileLock(lock)
    try:
        probe.acquire(timeout=0)
    except Timeout:
        return found
    probe.release()
    return None


def _age(file: Path, now: Path) -> float:
    """Seconds since `file` was touched, by the file server's clock: `now` is a file written this moment."""
    return now.stat().st_mtime - file.stat().st_mtime
