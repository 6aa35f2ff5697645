"""Hydra's callback that writes a sweep's cells down before the first one starts, in the launching process."""

import sys
from pathlib import Path

from filelock import FileLock
from hydra.experimental.callback import Callback

from kvq import sweep

launched: tuple[Path, list[str]] | None = None
"""Folder and cell keys of the sweep that this process launched."""
started = False
"""Whether a sweep began at all: Hydra turns a callback's exception into a warning, and without a plan nobody would count the failures."""


class Plan(Callback):
    """Named in conf/config.yaml under hydra.callbacks."""

    def on_multirun_start(self, config, **_) -> None:
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.override_parser.overrides_parser import OverridesParser

        global launched, started
        started = True
        words = [f"{k}={v}" for k, v in (config.hydra.sweeper.get("params") or {}).items()] + list(config.hydra.overrides.task)
        parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(words)
        cells = [sweep.essence(cell) for batch in BasicSweeper.split_arguments(parsed, None) for cell in batch]
        where = sweep.folder(config.outputs, config.sweep)
        write(where, cells, config.results)
        launched = (where, [sweep.key_of(cell) for cell in cells])


def write(where: Path, cells: list[list[str]], results: str) -> None:
    """Add cells to the plan in `where`: lists of overrides without those that say only where or how (sweep.essence)."""
    where.mkdir(parents=True, exist_ok=True)
    file = where / "plan.json"
    with FileLock(where / ".plan.lock"):
        known = sweep.read(file) or {"cells": {}}
        known["cells"].update({sweep.key_of(cell): cell for cell in cells})
        known.update(command=sys.argv[1:], results=str(Path(results).absolute()), date=sweep.now())
        sweep.write(file, known)
