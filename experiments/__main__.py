"""make figures, make tables: from results/ alone, without torch. A figure is redrawn when its rows or the code that draws them changed.

An experiment module defines `rows(results, model) -> DataFrame`, `draw(rows) -> Figure` and, or, `table(rows) -> tables.Table`. Every
model with rows gets its own figure and table: <name> for the stand-in, <name>-<model> for others.
"""

import argparse
import hashlib
import importlib
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd

import experiments
from experiments import committed, style, tables


def sources(module) -> set[str]:
    """Files of a module and of every module of this package that it uses."""
    found, waiting = set(), [module]
    while waiting:
        here = waiting.pop()
        if here.__file__ not in found:
            found.add(here.__file__)
            names = (v.__name__ if isinstance(v, ModuleType) else str(getattr(v, "__module__", "")) for v in vars(here).values())
            waiting += [sys.modules[name] for name in names if name.startswith("experiments.")]
    return found


def digest(module, rows: pd.DataFrame) -> str:
    """Hash of the rows and of the code that draws them."""
    state = hashlib.sha256(pd.util.hash_pandas_object(rows.astype(str), index=False).to_numpy().tobytes())
    for source in sorted(sources(module)):
        state.update(Path(source).read_bytes())
    return state.hexdigest()[:16]


def modules(names: list[str] | None) -> list:
    """The experiments, in alphabetical order; `names` restricts them. Raises ValueError for a name that is none."""
    found = [importlib.import_module(f"experiments.{m.name}") for m in pkgutil.iter_modules(experiments.__path__) if not m.name.startswith("_")]
    known = {m.__name__.rpartition(".")[2]: m for m in found if hasattr(m, "rows")}
    if unknown := sorted(set(names or ()) - set(known)):
        raise ValueError(f"there is no experiment {', '.join(unknown)}; choose from: {', '.join(sorted(known))}.")
    return [known[name] for name in sorted(set(names or known))]


def main(results: Path = Path("results"), names: list[str] | None = None, figures: bool = True, texts: bool = True) -> int:
    """Draw and write what changed; return 0."""
    style.setup()
    index = style.Index(results / "figures")
    for module in modules(names):
        name = module.__name__.rpartition(".")[2]
        for model in committed.models(results):
            rows = module.rows(results, model)
            place = name if model == "standin" else f"{name}-{model}"
            if rows.empty:
                if model == "standin":
                    print(f"{name}: no rows in {results} yet (python run.py experiment={name})")
                continue
            if texts and hasattr(module, "table"):
                tables.save(module.table(rows), place, results / "tables")
            if figures and hasattr(module, "draw"):
                mark = digest(module, rows)
                if index.current(place, mark):
                    print(f"{place}: unchanged")
                    continue
                paths = style.save(module.draw(rows), place, results / "figures")
                index.note(place, mark)
                print(f"{place}: drew {', '.join(str(p) for p in paths)}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m experiments", description="Draw figures and write tables from results/.")
    parser.add_argument("names", nargs="*", help="experiments; all if none is named")
    parser.add_argument("--only", choices=("figures", "tables"), help="one of the two; both if not given")
    chosen = parser.parse_args()
    try:
        modules(chosen.names)
    except ValueError as error:
        parser.error(str(error))
    sys.exit(main(names=chosen.names or None, figures=chosen.only != "tables", texts=chosen.only != "figures"))
