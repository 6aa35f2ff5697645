"""Rows of results/ as the experiments read them: loaded once per process, of one model, of one setting, with options of the run as columns."""

import functools
import json
import logging
from pathlib import Path

import pandas as pd

from experiments import choice
from kvq import results as store

log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=4)
def _load(folder: Path, state: tuple) -> pd.DataFrame:
    frame = store.load(folder)
    runs = frame.drop_duplicates("run").set_index("run")
    options = {run: json.loads(config) for run, config in runs["config"].items()}
    cells = pd.Series([store.fingerprint(r.quant, r.task, options[r.Index]) for r in runs.itertuples()], runs.index)
    latest = set(runs.assign(cell=cells).sort_values("date").drop_duplicates("cell", keep="last").index)
    return frame.assign(options=frame["run"].map(options))[frame["run"].isin(latest)]


def load(results: Path, **where) -> pd.DataFrame:
    """Rows under `results`/runs filtered by column values, with the parsed configuration in column `options`; of several runs of one cell the latest."""
    files = sorted(Path(results).glob("runs/*.parquet"))
    rows = _load(Path(results), tuple((f.name, f.stat().st_mtime_ns) for f in files))
    for column, wanted in where.items():
        rows = rows[rows[column].isin([wanted] if isinstance(wanted, str) else list(wanted))]
    return rows


def models(results: Path) -> list[str]:
    """Models with rows, the stand-in first; the tiny random model is for tests."""
    found = sorted(set(load(results)["model"]) - {"tiny", "standin"})
    return ["standin", *found]


def option(rows: pd.DataFrame, key: str, default=None) -> pd.Series:
    """An option of each row's run by dotted key: option(rows, "quant.key.beam")."""

    def find(options: dict):
        for part in key.split("."):
            if not isinstance(options, dict) or part not in options:
                return default
            options = options[part]
        return options

    return rows["options"].map(find)


def one_setting(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each task the rows of one size: the task and calibration options that most runs have, of several the longest calibration; fp16 rows of that task size.

    Runs of another size would be compared on other examples or codebooks; they stay in results/ and out of the figure, and a line says so.
    """
    if rows.empty:
        return rows
    kept = []
    for name, part in rows.groupby("task"):
        task, calib = _options(part, "task"), _options(part, "calib")
        runs = part.assign(_task=task, _calib=calib).drop_duplicates("run")
        runs = runs[runs["quant"] != "fp16"] if (runs["quant"] != "fp16").any() else runs
        best_task, best_calib = _most(runs.groupby(["_task", "_calib"]).size(), lambda sizes: sizes[1])
        same = (task == best_task) & ((calib == best_calib) | (part["calib"] == "none"))
        if not same.all():
            others = _differences(best_task, task[~same], "task.") + _differences(best_calib, calib[~same], "calib.")
            log.warning("%s: %d runs of another size stay out: %s", name, part[~same]["run"].nunique(), "; ".join(others))
        kept.append(part[same])
    return pd.concat(kept)


def one_calibration(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the calibration under which most cells (task, method, bits) were run, those that depend on none counted where the task had the same size; and all those."""
    free = rows["calib"] == "none"
    if free.all():
        return rows
    calib = _options(rows, "calib")
    cells = rows.assign(_calib=calib, _task=_options(rows, "task")).drop_duplicates(["_calib", "_task", "task", "quant", "bits"])
    plain, fitted = cells[free[cells.index]], cells[~free[cells.index]]
    beside = fitted.drop_duplicates(["_calib", "_task", "task"]).merge(plain, on=["_task", "task"], suffixes=("", "_plain"))["_calib"]
    counts = pd.concat([fitted["_calib"], beside]).value_counts()
    return rows[free | (calib == _most(counts, lambda size: size))]


def _most(counts: pd.Series, calib):
    """The size with most runs; of several, that of the longest calibration text. calib: a size's calibration options."""

    def rank(size) -> tuple:
        options = json.loads(calib(size))
        return counts[size], options.get("samples", 0) * options.get("length", 0)

    return max(counts.index, key=rank)


def calibration(rows: pd.DataFrame) -> pd.Series:
    """The calibration text of each row in words."""
    words = rows["options"].map(lambda o: f"{o['calib']['samples']} x {o['calib']['length']:,} tokens of {o['calib']['source']}")
    return words.where(rows["calib"] != "none", "none")


def _options(rows: pd.DataFrame, group: str) -> pd.Series:
    return rows["options"].map(lambda o: json.dumps({k: v for k, v in o[group].items() if v is not None and k not in (*store.HOW, "train")}, sort_keys=True))


def _differences(kept: str, others: pd.Series, prefix: str) -> list[str]:
    mine, theirs = json.loads(kept), [json.loads(other) for other in others.unique()]
    differing = {k: sorted({str(other.get(k)) for other in theirs} - {str(mine.get(k))}) for k in {*mine, *(k for other in theirs for k in other)}}
    return [f"{prefix}{k}={', '.join(values)} (here {mine.get(k)})" for k, values in sorted(differing.items()) if values]


def shipped(rows: pd.DataFrame, allowed: tuple[str, ...] = ()) -> pd.DataFrame:
    """Rows of runs whose quantizer has its shipped options but for `allowed` dotted keys, under the default prefill."""
    runs = rows.drop_duplicates("run")
    plain = {r.run for r in runs.itertuples() if set(choice.changes(r.quant, r.config)) <= set(allowed) and r.options["prefill"] == "quantized"}
    return rows[rows["run"].isin(plain)]


def records(results: Path, rows: pd.DataFrame, **columns) -> pd.DataFrame:
    """Predictions of the runs in `rows`, one row per record: its own keys, its metrics, and quant, bits, seed and run of its run."""
    found = []
    for run in rows.drop_duplicates("run").itertuples():
        mine = {name: getattr(run, name) for name in ("run", "quant", "bits", "bits_stored", "seed", *columns.values())}
        for line in (Path(results) / "runs" / f"{run.run}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found.append({**{k: v for k, v in record.items() if k not in ("metrics", "usage")}, **record["metrics"], **mine})
    return pd.DataFrame(found)
