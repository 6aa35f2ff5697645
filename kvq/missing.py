"""Which cells of the experiments have no rows yet, by the same names under which a run would be skipped. Computes nothing.

    python -m kvq.missing [experiment ...] [override ...]
    python -m kvq.missing pareto suites size=gpu model.dtype=bfloat16

Without experiments: all of conf/experiment. A run's name holds the number type, which `auto` makes bfloat16 on a GPU and float32 on a CPU: name it
to ask for another machine's rows. `kvq.campaign --missing` with the same words computes what is missing, in one go. A cell whose rows exist under another name
(made with another number type, or before an option or the embedded examples changed) is missing, and told apart as `renamed`.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from kvq import campaign, entry, results, sweep
from kvq.errors import Refusal


def cells(experiment: str, words: list[str], known: dict[str, list[str]]) -> list[tuple[str, str, str]]:
    """(state, what sets the cell apart, reason or run) for every cell: finished, renamed, refused or missing. known: `results.fingerprints` of the rows there are.

    Raises Refusal if there is no such experiment, hydra's errors if the words do not compose.
    """
    from hydra import initialize_config_dir

    from kvq.runner import finished, prepare

    found = []
    wanted = campaign.cells([experiment], words)
    with initialize_config_dir(entry.CONFIG, version_base="1.3"):
        for overrides in wanted:
            cfg, choices = campaign.composed(overrides)
            name = " ".join(w for w in sweep.essence(overrides) if w not in words and w != f"experiment={experiment}")
            try:
                cell = prepare(cfg, choices)
            except Refusal as refusal:
                found.append(("refused", name, str(refusal)))
                continue
            others = known.get(results.fingerprint(choices["quant"], choices["task"], cell.resolved), [])
            state = "finished" if finished(cell) else "renamed" if others else "missing"
            found.append((state, name, cell.run if state == "finished" else ", ".join(others)))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print one line per experiment and one per cell without rows; 0 if nothing is missing, 1 if something is, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m kvq.missing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="experiments and Hydra overrides, for example: pareto suites size=gpu")
    parser.add_argument("--counts", action="store_true", help="leave the cells out")
    given = parser.parse_intermixed_args(arguments)
    words = [w for w in given.words if "=" in w]
    names = [w for w in given.words if "=" not in w] or sorted(p.stem for p in Path(entry.CONFIG, "experiment").glob("*.yaml"))
    folder = next((Path(w.partition("=")[2]) for w in words if w.startswith("results=")), Path("results"))
    entry.prepare_environment()
    whole = True
    try:
        known = results.fingerprints(folder)
        for name in names:
            found = cells(name, words, known)
            counts = Counter(state for state, _, _ in found)
            whole &= not counts["missing"] + counts["renamed"]
            print(f"{name}: {len(found)} cells, " + ", ".join(f"{counts[s]} {s}" for s in ("finished", "renamed", "missing", "refused") if counts[s]), flush=True)
            for state, cell, reason in [] if given.counts else found:
                if state != "finished":
                    print(f"  {state:8} {cell}{': ' if reason else ''}{reason}")
    except Exception as error:
        print(f"error: {entry.explain(error) if isinstance(error, Refusal) else entry.sentence(str(error))}", file=sys.stderr)
        return 2
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
