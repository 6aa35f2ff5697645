"""Which cells of the experiments have no rows yet, by the same names under which a run would be skipped. Computes nothing.

    python -m kvq.missing [experiment ...] [override ...]
    python -m kvq.missing pareto suites size=gpu model.dtype=bfloat16

Without experiments: all of conf/experiment. A run's name holds the number type, which `auto` makes bfloat16 on a GPU and float32 on a CPU: name it
to ask for another machine's rows. `kvq.missing --list` prints each missing cell once, for `kvq.campaign --cells`. A cell whose rows exist under another name
(made with another number type, or before an option or the embedded examples changed) is missing, and told apart as `renamed`.
"""

import argparse
import shlex
import sys
from collections import Counter
from pathlib import Path

from kvq import campaign, entry, results, sweep
from kvq.errors import Refusal


def cells(experiment: str, words: list[str], known: dict[str, list[str]]) -> list[tuple[str, list[str], str]]:
    """(state, its overrides, reason or run) for every cell: finished, renamed, refused or missing. known: `results.fingerprints` of the rows there are.

    Raises Refusal if there is no such experiment, hydra's errors if the words do not compose.
    """
    from hydra import initialize_config_dir

    from kvq.runner import finished, prepare

    found = []
    wanted = campaign.cells([experiment], words)
    with initialize_config_dir(entry.CONFIG, version_base="1.3"):
        for overrides in wanted:
            cfg, choices = campaign.composed(overrides)
            try:
                cell = prepare(cfg, choices)
            except Refusal as refusal:
                found.append(("refused", overrides, str(refusal)))
                continue
            others = known.get(results.fingerprint(choices["quant"], choices["task"], cell.resolved), [])
            state = "finished" if finished(cell) else "renamed" if others else "missing"
            found.append((state, overrides, ", ".join(others) if state == "renamed" else cell.run))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print one line per experiment and one per cell without rows; 0 if nothing is missing, 1 if something is, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m kvq.missing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="experiments and Hydra overrides, for example: pareto suites size=gpu")
    parser.add_argument("--counts", action="store_true", help="leave the cells out")
    parser.add_argument("--list", action="store_true", help="print every missing cell once and nothing else, for kvq.campaign --cells")
    given = parser.parse_intermixed_args(arguments)
    words = [w for w in given.words if "=" in w]
    names = [w for w in given.words if "=" not in w] or sorted(p.stem for p in Path(entry.CONFIG, "experiment").glob("*.yaml"))
    folder = next((Path(w.partition("=")[2]) for w in words if w.startswith("results=")), Path("results"))
    entry.prepare_environment()
    whole, listed = True, set()
    try:
        known = results.fingerprints(folder)
        for name in names:
            found = cells(name, words, known)
            if given.list:
                new = {run: cell for state, cell, run in found if state == "missing" and run not in listed}
                listed |= new.keys()
                print("".join(shlex.join(cell) + "\n" for cell in new.values()), end="", flush=True)
                continue
            counts = Counter(state for state, _, _ in found)
            whole &= not counts["missing"] + counts["renamed"]
            print(f"{name}: {len(found)} cells, " + ", ".join(f"{counts[s]} {s}" for s in ("finished", "renamed", "missing", "refused") if counts[s]), flush=True)
            for state, cell, reason in [] if given.counts else found:
                if state != "finished":
                    told = " ".join(w for w in sweep.essence(cell) if w not in words and w != f"experiment={name}")
                    print(f"  {state:8} {told}" + (f": {reason}" if state in ("renamed", "refused") else ""))
    except Exception as error:
        print(f"error: {entry.explain(error) if isinstance(error, Refusal) else entry.sentence(str(error))}", file=sys.stderr)
        return 2
    return 0 if whole and not listed else 1


if __name__ == "__main__":
    sys.exit(main())
