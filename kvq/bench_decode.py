"""Every whole-step row in one command: kernels are compiled for all cells at once, then the cells are timed one after the other.

    python -m kvq.bench_decode [experiment ...] [override ...] [--minutes 5] [--scratch DIR]

Without experiments: blockgtq_deployment and gsrq_latency. A cell is a process of its own (`run.py`), so that one that dies takes no other along,
and has its own time box (`task.box`); after the minutes no further cell begins. Finished cells are skipped by content: the same words go on.
Compiled kernels and calibrations stay on disk between the processes; what the first round times goes to the scratch folder and is dropped.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ("blockgtq_deployment", "gsrq_latency")
LITTLE = ("task.pairs=[[1,288]]", "task.prefill=512", "task.chunk=256", "task.encode=256", "task.repeats=3", "force=true")
"""What makes a cell short and still compiles its kernels."""


def cells(experiment: str, words: list[str]) -> list[list[str]]:
    """The command-line words of every cell of an experiment's sweep; words of the caller replace the sweep's own."""
    given = {word.split("=", 1)[0] for word in words}
    params = yaml.safe_load((ROOT / "conf" / "experiment" / f"{experiment}.yaml").read_text())["hydra"]["sweeper"]["params"]
    axes = [[f"{key}={value}" for value in str(values).split(",")] for key, values in params.items() if key not in given]
    return [[f"experiment={experiment}", "hydra.mode=RUN", *chosen, *words] for chosen in itertools.product(*axes)]


def main(arguments: list[str] | None = None) -> int:
    """0 if every cell ended well, 1 if one failed or did not begin."""
    parser = argparse.ArgumentParser(prog="python -m kvq.bench_decode", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="experiments and overrides")
    parser.add_argument("--minutes", type=float, default=5.0, help="after which no further cell begins")
    parser.add_argument("--scratch", help="folder of the first round; a temporary one if not given, none to leave it out")
    given = parser.parse_intermixed_args(arguments)
    words = [word for word in given.words if "=" in word]
    jobs = [job for name in [w for w in given.words if "=" not in w] or EXPERIMENTS for job in cells(name, words)]
    end = time.monotonic() + 60 * given.minutes
    if given.scratch != "none":
        with tempfile.TemporaryDirectory() as folder:
            _warm(jobs, given.scratch or folder, end)
    lost = 0
    for job in jobs:
        if time.monotonic() > end:
            print(f"not begun: {' '.join(job)}", flush=True)
            lost += 1
            continue
        start = time.monotonic()
        code = subprocess.run([sys.executable, "run.py", *job], cwd=ROOT).returncode
        print(f"{'done' if code == 0 else f'failed ({code})'} in {time.monotonic() - start:.0f} s: {' '.join(job)}", flush=True)
        lost += code != 0
    return int(lost > 0)


def _warm(jobs: list[list[str]], scratch: str, end: float) -> None:
    """All cells at once, shortened, their rows in `scratch`; those that are not done by the end of the time are ended."""
    start = time.monotonic()
    running = [subprocess.Popen([sys.executable, "run.py", *job, *LITTLE, f"results={scratch}/{i}"], cwd=ROOT, stdout=subprocess.DEVNULL) for i, job in enumerate(jobs)]
    for process in running:
        try:
            process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
    codes = [process.wait() for process in running]
    print(f"compiled in {time.monotonic() - start:.0f} s; {sum(c != 0 for c in codes)} of {len(codes)} short cells failed", flush=True)


if __name__ == "__main__":
    sys.exit(main())
