"""One of `jobs` places on this machine for a process of a parallel sweep: a GPU of its own and its share of the CPU cores.

A process keeps its place until it ends, also from job to job where a launcher reuses workers; kill -9 frees it.
"""

import os
import subprocess
import time
from pathlib import Path

from filelock import FileLock, Timeout

from kvq.claim import HOST
from kvq.errors import Refusal

_held: FileLock | None = None


def take(folder: Path, jobs: int, prefer: int) -> int:
    """Wait for a free place, the job's own number first; pin GPU and threads. Call before CUDA or OpenMP start. Returns the place.

    Raises Refusal unless jobs is at least 1.
    """
    global _held
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise Refusal(f"jobs={jobs} is not a whole number from 1 on.")
    if _held is not None:
        return int(Path(_held.lock_file).stem.rpartition("-")[2])
    folder.mkdir(parents=True, exist_ok=True)
    place = _wait(folder, jobs, prefer)
    gpus = visible_gpus()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = threads
    import torch

    torch.set_num_threads(int(threads))
    return place


def _wait(folder: Path, jobs: int, prefer: int) -> int:
    global _held
    while True:
        for place in ((prefer + i) % jobs for i in range(jobs)):
            lock = FileLock(folder / f"{HOST}-{place}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            _held = lock
            return place
        time.sleep(0.2)


GPUS = "KVQ_GPUS"
"""The launching process's GPUs, noted for its workers: submitit's local executor hides all of them from jobs that ask it for none."""


def visible_gpus() -> list[str]:
    """Ids of the GPUs this process or the one that launched it may use, without touching CUDA."""
    given = os.environ.get(GPUS, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if given is not None:
        return [gpu for gpu in given.split(",") if gpu.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.split() if listed.returncode == 0 else []
