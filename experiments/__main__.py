"""make figures: draw every experiment from results/ alone. A figure is redrawn when its rows, its module or the style changed.

An experiment module defines `rows(results) -> DataFrame` and `draw(rows) -> Figure`, and may define `table(rows) -> str` (Markdown);
modules without `draw` are left alone. Figures go to results/figures, tables to results/tables.
"""

import hashlib
import importlib
import pkgutil
import sys
from pathlib import Path

import pandas as pd

import experiments
from experiments import choice, style


def digest(module, rows: pd.DataFrame) -> str:
    """Hash of the rows, the drawing module and the style."""
    state = hashlib.sha256(pd.util.hash_pandas_object(rows.astype(str), index=False).to_numpy().tobytes())
    for source in (module.__file__, style.__file__, choice.__file__):
        state.update(Path(source).read_bytes())
    return state.hexdigest()[:16]


def main(results: Path = Path("results"), names: list[str] | None = None) -> int:
    """Draw what changed; return 0. `names` restricts the experiments."""
    style.setup()
    index = style.Index(results / "figures")
    for found in sorted(pkgutil.iter_modules(experiments.__path__), key=lambda m: m.name):
        if found.name.startswith("_") or (names and found.name not in names):
            continue
        module = importlib.import_module(f"experiments.{found.name}")
        if not hasattr(module, "draw"):
            continue
        rows = module.rows(results)
        if rows.empty:
            print(f"{found.name}: no rows in {results} yet (python run.py experiment={found.name})")
            continue
        mark = digest(module, rows)
        if index.current(found.name, mark):
            print(f"{found.name}: unchanged")
            continue
        paths = style.save(module.draw(rows), found.name, results / "figures")
        if hasattr(module, "table"):
            paths.append(results / "tables" / f"{found.name}.md")
            paths[-1].parent.mkdir(exist_ok=True)
            paths[-1].write_text(module.table(rows))
        index.note(found.name, mark)
        print(f"{found.name}: drew {', '.join(str(p) for p in paths)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(names=sys.argv[1:] or None))
