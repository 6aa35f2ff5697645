"""Weights & Biases as a logger. It may be absent, unreachable or broken: that is said once, and the run goes on without it."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvq.logger import Silent

log = logging.getLogger(__name__)
PATIENCE = 300
"""Seconds that the last upload may take before the run goes on without it."""


class WandB(Silent):
    """One tracked run per computed cell: config, progress by example, rows and bits as summary, predictions as a table, files as artifacts.

    mode: auto (online if a key is set up, else offline), online or offline. outputs: parent of the `wandb` folder. results: the folder whose
    figures and tables are attached. A resumed cell continues its run, since the id is the run's hash and the step the number of finished examples.
    """

    def __init__(self, project: str, entity: str | None, group: str | None, mode: str, outputs: str, results: str, predictions: int):
        self.project, self.entity, self.group, self.mode = project, entity, group, mode
        self.outputs, self.results, self.predictions = Path(outputs), Path(results), predictions
        self._run = None

    @contextmanager
    def run(self, cell) -> Iterator["WandB"]:
        self._cell = cell
        self._try("start", self._start)
        try:
            yield self
        except BaseException:
            self._close(1)
            raise
        self._close(0)

    def resume(self, records: list[dict], total: int) -> None:
        self._sums, self._done, self._total = {}, 0, total
        for record in records:
            self._count(record)

    def example(self, record: dict) -> None:
        self._count(record)
        means = {f"progress/{name}": value / weight for name, (value, weight) in self._sums.items() if weight}
        self._try("log", lambda: self._run.log({"done": self._done, "total": self._total, **means}, step=self._done))

    def finish(self, frame, records: list[dict]) -> None:
        self._try("log the results", lambda: self._results(frame, records))

    def _count(self, record: dict) -> None:
        self._done += 1
        weight = record.get("weight", 1)
        for name, value in record["metrics"].items():
            if isinstance(value, (int, float)):
                total, seen = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (total + weight * value, seen + weight)

    def _start(self) -> None:
        import wandb

        cell, choices = self._cell, self._cell.choices
        mode = self.mode if self.mode != "auto" else os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        self.outputs.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self.project, entity=self.entity, group=self.group, id=cell.run, resume="allow", mode=mode, dir=str(self.outputs.absolute()),
            name=f"{choices['model']} {choices['quant']} {cell.label:g} {choices['task']}", job_type="reference" if cell.is_reference else "cell",
            config={**cell.resolved, "run": cell.run, "choices": choices, "identity": cell.identity}, reinit="finish_previous",
            settings=wandb.Settings(silent=True, console="off", init_timeout=60, disable_git=True),
        )  # fmt: skip

    def _results(self, frame, records: list[dict]) -> None:
        import wandb

        first = frame.iloc[0]
        self._run.summary.update({name: first[name].item() for name in ("bits", "bits_stored", "bits_total", "encoded_tokens")})
        self._run.summary.update({f"{row.subset}/{row.metric}": row.value for row in frame.itertuples()})
        names = sorted({name for record in records for name in record["metrics"]})
        table = wandb.Table(columns=["id", "subset", "prediction", "target", *names])
        for record in records[: self.predictions]:
            table.add_data(record["id"], record["subset"], *(str(record.get(k)) for k in ("prediction", "target")), *(record["metrics"].get(n) for n in names))
        self._run.log({"predictions": table}, step=self._done)
        rows = wandb.Artifact(f"rows-{self._cell.run}", type="rows")
        for file in (self._cell.path, self._cell.path.with_suffix(".jsonl")):
            rows.add_file(str(file))
        self._run.log_artifact(rows)
        drawn = [file for name in ("figures", "tables") for file in sorted((self.results / name).glob("*")) if file.is_file()]
        if drawn:
            figures = wandb.Artifact("figures", type="figures", description="Figures and ledger tables as they were when this run ended")
            for file in drawn:
                figures.add_file(str(file), name=f"{file.parent.name}/{file.name}")
            self._run.log_artifact(figures)

    def _close(self, code: int) -> None:
        if self._run is not None:
            closing = threading.Thread(target=lambda: self._try("finish", lambda: self._run.finish(exit_code=code)), daemon=True)
            closing.start()
            closing.join(PATIENCE)
            if closing.is_alive():
                log.warning("W&B did not finish within %s s; the run's rows are in results/ all the same.", PATIENCE)

    def _try(self, what: str, call) -> None:
        if self._run is None and what != "start":
            return
        try:
            call()
        except Exception as error:  # a tracker has no say in whether a run succeeds
            log.warning("W&B could not %s (%s: %s); the run goes on without it.", what, type(error).__name__, str(error).strip().splitlines()[:1])
            self._run = None


def _has_key() -> bool:
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except Exception:  # no network to check it, or no key: record here, upload later
        return False
