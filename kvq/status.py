"""make sweep-status: what became of every cell of every sweep, with reasons, and one table of what is finished. No torch.

    python -m kvq.status [outputs] [--sweep NAME]
"""

import argparse
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pandas as pd

from kvq import claim, results, sweep
from kvq.errors import Refusal


class State(StrEnum):
    DONE, RUNNING, FAILED, STOPPED, MISSING = "done", "running", "failed", "stopped", "missing"


@dataclass
class Status:
    """One cell: its key in the plan, the overrides that set it apart, and why it is not done. `run` is None before it was named."""

    key: str
    cell: str
    state: State
    reason: str
    run: str | None


def states(where: Path) -> list[Status]:
    """The cells of one sweep folder in the plan's order. Raises Refusal if there is no plan."""
    plan = sweep.read(where / "plan.json")
    if plan is None or not isinstance(plan.get("cells"), dict):
        raise Refusal(f"{where} holds no readable plan; start the sweep again, finished cells are not repeated.")
    folder = Path(plan.get("results", "results"))
    common = set.intersection(*map(set, plan["cells"].values())) if len(plan["cells"]) > 1 else set()
    named = {key: " ".join(word for word in cell if word not in common) for key, cell in plan["cells"].items()}
    return [_status(key, cell, sweep.read(where / f"{key}.json"), folder, where.parent.parent) for key, cell in named.items()]


def _status(key: str, cell: str, noted: dict | None, folder: Path, outputs: Path) -> Status:
    noted = noted or {}
    run, state = noted.get("run"), noted.get("state")
    if state == "estimated":
        return Status(key, cell, State.DONE, "dry run, nothing computed", run)
    name = f"{run}{noted.get('part', '')}"
    if run and (owner := claim.held(folder / ".claims", name)):
        partial = outputs / "partial" / f"{name}.jsonl"
        examples = partial.read_bytes().count(b"\n") if partial.is_file() else 0
        return Status(key, cell, State.RUNNING, f"{claim.describe(owner)}, {examples} examples so far", run)
    if state == "failed":  # before its rows: those of a forced cell are the old ones
        return Status(key, cell, State.FAILED, noted.get("reason", "no reason noted"), run)
    if run and (folder / "runs" / f"{run}.parquet").is_file():
        return Status(key, cell, State.DONE, "", run)
    if state == "finished part":
        return Status(key, cell, State.DONE, "the rows follow with the last part", run)
    if state == "finished":
        return Status(key, cell, State.MISSING, "its rows were deleted; run the sweep again", run)
    if state in ("running", "claimed"):
        if run is None and noted.get("host") == claim.HOST and _alive(noted.get("pid")):
            return Status(key, cell, State.RUNNING, f"process {noted.get('pid')}, preparing", run)
        return Status(key, cell, State.STOPPED, f"process {noted.get('pid')} on {noted.get('host')} ended without a word (killed?); run the sweep again", run)
    return Status(key, cell, State.MISSING, "not started", run)


def _alive(pid) -> bool:
    return isinstance(pid, int) and Path(f"/proc/{pid}").exists()


def collected(where: Path, found: list[Status]) -> pd.DataFrame:
    """One row per finished cell: score beside fp16, three bit numbers; damaged result files are left out and named on stderr."""
    folder = Path((sweep.read(where / "plan.json") or {}).get("results", "results"))
    rows = []
    for one in found:
        path = folder / "runs" / f"{one.run}.parquet"
        if one.state != State.DONE or not path.is_file():
            continue
        try:
            rows.append(_row(results.read(path)))
        except Refusal as error:
            print(f"error: {error}", file=sys.stderr)
    return pd.DataFrame(rows)


def _row(frame: pd.DataFrame) -> dict:
    first, scores = frame.iloc[0], frame[frame.subset != "run"]
    subset = "average" if (scores.subset == "average").any() else scores.subset.iloc[0]
    paired = [m for m in scores.metric if m.endswith("_minus_fp16")]
    main = paired[0].removesuffix("_minus_fp16") if paired else scores.metric.iloc[0]
    value = scores[scores.subset == subset].set_index("metric").value
    names = ("run", "model", "quant", "task", "bits", "bits_stored", "bits_total", "seed")
    return {**{n: first[n] for n in names}, "subset": subset, "metric": main, "value": value.get(main), "fp16": value.get(f"{main}_fp16"), "n": int(scores.n.iloc[0])}


def main(arguments: list[str] | None = None) -> int:
    """Print; 0 if every cell is done, 1 if not, 2 if there is nothing to say."""
    parser = argparse.ArgumentParser(prog="python -m kvq.status")
    parser.add_argument("outputs", nargs="?", default="outputs", type=Path)
    parser.add_argument("--sweep", help="only this one")
    given = parser.parse_args(arguments)
    folders = sorted((p.parent for p in given.outputs.glob("sweeps/*/plan.json")), key=lambda p: (p / "plan.json").stat().st_mtime)
    folders = [f for f in folders if given.sweep in (None, f.name)]
    if not folders:
        print(f"error: no sweep{f' {given.sweep}' if given.sweep else ''} under {given.outputs}; start one with python run.py -m ...", file=sys.stderr)
        return 2
    whole = True
    for where in folders:
        try:
            whole &= _print(where)
        except Refusal as error:
            print(f"error: {error}", file=sys.stderr)
            whole = False
    return 0 if whole else 1


def _print(where: Path) -> bool:
    found = states(where)
    counts = ", ".join(f"{sum(s.state == state for s in found)} {state}" for state in State if any(s.state == state for s in found))
    print(f"sweep {where.name}: {counts} of {len(found)}")
    for one in found:
        if one.state != State.DONE or one.reason:
            print(f"  {one.state:8} {one.cell}: {one.reason}")
    table = collected(where, found)
    if len(table):
        results.replace(where / "table.csv", lambda temporary: table.to_csv(temporary, index=False))
        print(table.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    return all(s.state == State.DONE for s in found)


if __name__ == "__main__":
    sys.exit(main())
