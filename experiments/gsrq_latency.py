"""GSRQ Tables 12 and 13: decode attention from residual codes, against an fp16 cache whose KV heads are shared and not repeated."""

from pathlib import Path

import pandas as pd

from experiments import latency, latency_figure, reported


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    return latency.both(results, ["vq_attention"], True, "vq_kmeans", "vq_calibration", "vq_encode") if model == "standin" else pd.DataFrame()


speedups, whole = latency.speedups, latency.whole
draw = latency_figure.draw


def table(rows: pd.DataFrame):
    made = latency.tabulate(rows, "Decode attention of one layer.", "gsrq_latency")
    paper = reported.table("gsrq", "T12", "T13")[["table", "metric", "method", "context", "batch", "value", "unit"]]
    return made.add("Reported (GSRQ Tables 12 and 13, A100-80GB, whole model; the fp16 baseline appears to repeat KV heads)", paper)
