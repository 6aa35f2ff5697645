"""Rows of the reconstruction task with kind, split, stage and the codec's shape as columns."""

from pathlib import Path

import pandas as pd

from experiments import committed

SPLITS = {"train": "calibration text", "heldout": "held-out text"}


def gather(results: Path, model: str, quants: tuple[str, ...], metrics: tuple[str, ...]) -> pd.DataFrame:
    """Columns quant, start, piece, entries, beam, bits, seed, samples, kind, split, stage (0: whole codec), metric, value, stderr over layers."""
    frame = committed.load(results, model=model, task="reconstruction", quant=list(quants))
    name, stage = (frame["metric"].str.split("/", n=1).str[i] for i in (0, 1))
    frame = frame.assign(metric=name, stage=pd.to_numeric(stage, errors="coerce").fillna(0).astype(int))
    frame = frame[frame["metric"].isin(metrics) & frame["subset"].str.fullmatch(r"(key|value) (train|heldout)")]
    columns = {
        "start": "quant.key.cluster.start", "piece": "quant.key.piece", "entries": "quant.key.entries", "beam": "quant.key.beam",
        "stages_given": "quant.key.stages", "samples": "calib.samples",
    }  # fmt: skip
    found = frame.assign(kind=frame["subset"].str.split().str[0], split=frame["subset"].str.split().str[1], **{c: committed.option(frame, key) for c, key in columns.items()})
    keep = ["quant", *columns, "bits", "seed", "kind", "split", "stage", "metric", "value", "stderr", "run", "model"]
    return found[keep].sort_values(["quant", "bits", "seed", "kind", "split", "metric", "stage"], ignore_index=True)


def shaped(rows: pd.DataFrame) -> pd.DataFrame:
    """Runs of two stages at a named piece, on the largest calibration there is."""
    rows = rows[rows["piece"].notna()]
    rows = rows[rows["samples"] == rows["samples"].max()] if len(rows) else rows
    return rows.astype({"piece": int}) if len(rows) else rows
