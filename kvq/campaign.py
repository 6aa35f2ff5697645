"""Every cell of several experiments, each once, in one pool of processes over the GPUs of this machine: how all committed rows are made again.

    python -m kvq.campaign [experiment ...] [override ...]          make rows EXPERIMENTS="pareto suites" SIZE=gpu JOBS=36
    python -m kvq.campaign pareto suites size=gpu --jobs 36 --heavy 6 --minutes 9

Processes share a GPU by turns unless NVIDIA's MPS daemon runs (`nvidia-cuda-mps-control -d`): with many short kernels that is most of the time.
A sweep per experiment would leave GPUs idle at the end of each. Finished runs are skipped by content: a campaign that was killed, or ran out
of its minutes, goes on when started with the same words. Without experiments: all of conf/experiment.
"""

import argparse
import multiprocessing
import os
import shlex
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tqdm import tqdm

from kvq import entry, plan, sweep
from kvq.errors import Refusal

HEAVY = ("niah", "longbench")
"""Tasks whose batches of long prompts fill a GPU's memory."""
SLOWEST = ("niah", "longbench", "aime", "choices", "perplexity")
"""The order in which tasks are handed out, others after them: a long cell that starts last is waited for by all."""
CROWDED = ("out of memory", "not fit in memory")
"""What the sentence of a cell says that found a GPU full of other cells: it is computed again at the end, with a GPU to itself."""
ALONE = ("latency", "latency_compiled")
"""Tasks that need the machine to themselves; they are left to `python -m kvq.bench_decode`."""


def cells(experiments: list[str], words: list[str]) -> list[list[str]]:
    """The overrides of every cell of the experiments' sweeps, `words` added to each, those that say the same left out. Raises Refusal on unknown names."""
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    known = sorted(p.stem for p in Path(entry.CONFIG, "experiment").glob("*.yaml"))
    if unknown := sorted(set(experiments) - set(known)):
        raise Refusal(f"there is no experiment {', '.join(unknown)}; choose from: {', '.join(known)}.")
    parser, found = OverridesParser.create(), {}
    with initialize_config_dir(entry.CONFIG, version_base="1.3"):
        for name in experiments or known:
            composed = compose("config", [f"experiment={name}", *words], return_hydra_config=True)
            params = composed.hydra.sweeper.get("params") or {}
            asked = [f"{k}={v}" for k, v in params.items()] + [f"experiment={name}", *words]
            for batch in BasicSweeper.split_arguments(parser.parse_overrides(asked), None):
                for cell in batch:
                    found.setdefault(tuple(sweep.essence(cell)), cell)
    return sorted((cell for cell in found.values() if _task(cell) not in ALONE), key=_slowness)


def listed(file: Path, words: list[str]) -> list[list[str]]:
    """The cells of a file, `words` added to each. Raises Refusal if there is no such file."""
    if not file.is_file():
        raise Refusal(f"there is no file {file}; make one with `python -m kvq.missing --list > {file}`.")
    return sorted(([*shlex.split(line), *words] for line in file.read_text().splitlines() if line), key=_slowness)


def _slowness(cell: list[str]) -> int:
    task = _task(cell)
    return SLOWEST.index(task) if task in SLOWEST else len(SLOWEST)


def _task(cell: list[str]) -> str:
    return next((word.partition("=")[2] for word in reversed(cell) if word.startswith("task=")), "longbench")


def composed(overrides: list[str]) -> tuple:
    """(config, choices of the groups) of one cell, as Hydra hands them to the runner; inside initialize_config_dir."""
    from hydra import compose
    from omegaconf import open_dict

    cfg = compose("config", overrides, return_hydra_config=True)
    choices = {k: v for k, v in cfg.hydra.runtime.choices.items() if k in entry.GROUPS and v}
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


def work(pipe: Connection, name: str, folders: list[str], log: Path, gpu: str | None, threads: int) -> None:
    """One process of the pool: compute the cells that come through the pipe, answer each with what became of it. Prints into a log of its own."""
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch
    from hydra import initialize_config_dir

    torch.set_num_threads(threads)
    with initialize_config_dir(entry.CONFIG, version_base="1.3"):
        while cell := _next(pipe):
            try:
                cfg, choices = composed([*cell, *folders, f"sweep={name}"])
                pipe.send(entry.noted(cfg, choices, sweep.Note(sweep.folder(cfg.outputs, name), cell)))
            except Exception as error:  # a config that does not compose
                pipe.send(entry.explain(error))


def _next(pipe: Connection) -> list[str] | None:
    try:
        return pipe.recv()
    except EOFError:  # the parent died
        return None


class Pool:
    """`jobs` processes; a cell goes to the first free one whose GPU has room for it."""

    def __init__(self, jobs: int, heavy: int, gpus: list[str], where: Path, folders: list[str]):
        """where: the sweep's folder, for logs. folders: overrides for every cell that do not say what is computed."""
        self.heavy, self.gpus, self.where, self.folders = heavy, gpus, where, folders
        self.threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        self.free = [self._start(i) for i in range(jobs)]
        self.busy: dict[Connection, tuple] = {}

    def _start(self, place: int) -> tuple:
        here, there = multiprocessing.get_context("spawn").Pipe()
        gpu = self.gpus[place % len(self.gpus)] if self.gpus else None
        told = (there, self.where.name, self.folders, self.where / f"worker-{place}.log", gpu, self.threads)
        process = multiprocessing.get_context("spawn").Process(target=work, args=told, daemon=True)
        process.start()
        there.close()  # so that a dead worker's pipe ends
        return place, gpu, process, here

    def run(self, waiting: list[list[str]], deadline: float) -> dict[str, list[list[str]]]:
        """Cells by what became of them: "" done, "busy" elsewhere, "late" not started in time, else the sentence of its failure."""
        ended = self._run(waiting, deadline, alone=False)
        crowded = [cell for reason in [r for r in ended if any(word in r for word in CROWDED)] for cell in ended.pop(reason)]
        for reason, cells in self._run(crowded, deadline, alone=True).items() if crowded else ():
            ended.setdefault(reason, []).extend(cells)
        return ended

    def _run(self, waiting: list[list[str]], deadline: float, alone: bool) -> dict[str, list[list[str]]]:
        ended: dict[str, list] = {}
        waiting = list(waiting)
        progress = tqdm(total=len(waiting), unit="cell", disable=None)
        while waiting or self.busy:
            if time.monotonic() > deadline:
                for cell in waiting + [cell for _, cell in self.busy.values()]:
                    ended.setdefault("late", []).append(cell)
                break
            self._hand_out(waiting, alone)
            for pipe in wait(list(self.busy), timeout=min(5.0, max(0.0, deadline - time.monotonic()))):
                (place, gpu, process, _), cell = self.busy.pop(pipe)
                progress.update()
                try:
                    ended.setdefault(pipe.recv(), []).append(cell)
                    self.free.append((place, gpu, process, pipe))
                except (EOFError, ConnectionResetError):
                    process.join()
                    ended.setdefault(f"its process was killed (exit code {process.exitcode}; out of memory?)", []).append(cell)
                    self.free.append(self._start(place))
        return ended

    def _hand_out(self, waiting: list[list[str]], alone: bool) -> None:
        load = Counter(worker[1] for worker, cell in self.busy.values() if _task(cell) in HEAVY)
        for worker in list(self.free):
            if alone and any(worker[1] == other[1] for other, _ in self.busy.values()):
                continue
            cell = next((c for c in waiting if load[worker[1]] < self.heavy or _task(c) not in HEAVY), None)
            if cell is not None:
                waiting.remove(cell)
                self.free.remove(worker)
                load[worker[1]] += _task(cell) in HEAVY
                worker[3].send(cell)
                self.busy[worker[3]] = (worker, cell)

    def close(self) -> None:
        for _, _, process, pipe in self.free:
            pipe.send(None)
            process.join()
        for (_, _, process, _), _ in self.busy.values():
            process.kill()  # claims end with their process; the records it wrote are kept
            process.join()


def main(arguments: list[str] | None = None) -> int:
    """0: every cell has its rows; 2: some failed or were refused; 3: some were left for want of time or to other processes."""
    from kvq.slots import visible_gpus

    parser = argparse.ArgumentParser(prog="python -m kvq.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="experiments and Hydra overrides, for example: pareto suites size=gpu seed=1")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once, spread over the visible GPUs")
    parser.add_argument("--heavy", type=int, default=6, help=f"of these, at most so many per GPU on {' or '.join(HEAVY)}")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then; the same words go on later")
    parser.add_argument("--cells", type=Path, help="a file of cells, one per line as --list and kvq.missing --list print them, in place of experiments")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    given = parser.parse_intermixed_args(arguments)
    if given.jobs < 1 or given.heavy < 1:
        print("error: --jobs and --heavy are whole numbers from 1 on.", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * given.minutes
    words = [w for w in given.words if "=" in w]
    try:
        names = [w for w in given.words if "=" not in w]
        wanted = listed(given.cells, sweep.essence(words)) if given.cells and not names else cells(names, sweep.essence(words))
    except Exception as error:
        print(f"error: {entry.explain(error) if isinstance(error, Refusal) else entry.sentence(str(error))}", file=sys.stderr)
        return 2
    if given.list:
        print("\n".join(shlex.join(cell) for cell in wanted))
        return 0
    entry.prepare_environment()
    folders = [w for w in words if w not in sweep.essence(words)]
    place = {"results": "results", "outputs": "outputs", **dict(w.split("=", 1) for w in folders)}
    where = sweep.folder(place["outputs"], sweep.name_of(["campaign", *given.words]))
    plan.write(where, [sweep.essence(cell) for cell in wanted], place["results"])
    pool = Pool(given.jobs, given.heavy, visible_gpus(), where, folders)
    try:
        ended = pool.run(wanted, deadline)
    finally:
        pool.close()
    for reason, failed in ended.items():
        if reason not in ("", "busy", "late"):
            more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
            print(f"error: {' '.join(failed[0])}{more}: {reason}", file=sys.stderr)
    done, left = len(ended.get("", [])), len(ended.get("busy", []) + ended.get("late", []))
    print(f"{done} of {len(wanted)} cells done, {len(wanted) - done - left} failed, {left} left; logs in {where}", file=sys.stderr)
    return 0 if done == len(wanted) else 3 if done + left == len(wanted) else 2


if __name__ == "__main__":
    sys.exit(main())
