"""Block-GTQ against uniform TQ-MSE at equal stored bytes: fractional averages put both on one axis."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments import heads, style
from experiments.tables import Table

METHODS = ("tq_mse", "blockgtq", "blockgtq_tiles", "blockgtq_plus")
METRICS = {"logit_mae": "logit MAE (before softmax)", "kl": "KL to exact attention (nats)"}


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """Mean over heads per run, both metrics in long form."""
    parts = []
    for task, metric in (("logit_mae", "logit_mae"), ("attention", "kl")):
        found = heads.gather(results, model, task, METHODS, allowed=("value.bits",))
        if len(found):
            found = found.groupby(["quant", "key_bits", "seed"], as_index=False).agg(bits_stored=("bits_stored", "mean"), value=(metric, "mean"))
            parts.append(found.assign(metric=metric, model=model))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def draw(rows: pd.DataFrame):
    panels = [m for m in METRICS if (rows["metric"] == m).any()]
    figure, axes = plt.subplots(1, len(panels), figsize=(style.PAGE if len(panels) > 1 else style.COLUMN, 2.6), squeeze=False)
    for axis, metric in zip(axes[0], panels):
        ends = []
        for quant in METHODS:
            cells = rows[(rows["metric"] == metric) & (rows["quant"] == quant)].groupby("key_bits").agg(x=("bits_stored", "mean"), y=("value", "mean"), s=("value", "std"))
            if len(cells):
                style.points(axis, cells.x, cells.y, cells.s, quant)
                ends.append((float(cells.y.iloc[-1]), style.label(quant), style.color(quant)))
        style.plain_log(axis, "y", 10)
        axis.set_xlabel("stored bits per key value (codes and norms)")
        axis.set_ylabel(METRICS[metric])
        style.name_ends(axis, ends)
    return figure


def ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Error over TQ-MSE's at the same stored bits (log-linear between TQ-MSE's budgets), where those cover them; below 1 is better."""
    lines = []
    for metric, part in rows.groupby("metric"):
        cells = part.groupby(["quant", "key_bits"]).agg(x=("bits_stored", "mean"), y=("value", "mean"))
        if "tq_mse" not in cells.index.get_level_values(0):
            continue
        tq = cells.loc["tq_mse"]
        for (quant, bits), cell in cells.iterrows():
            if quant != "tq_mse" and tq.x.min() <= cell.x <= tq.x.max():
                lines.append(
                    {"metric": metric, "quant": quant, "key_bits": bits, "stored": cell.x, "value": cell.y, "ratio": cell.y / float(np.exp(np.interp(cell.x, tq.x, np.log(tq.y))))}
                )
    return pd.DataFrame(lines, columns=["metric", "quant", "key_bits", "stored", "value", "ratio"])


def table(rows: pd.DataFrame) -> Table:
    return Table(
        "Error of coded keys (values stay exact) and, as a ratio, that over TQ-MSE's at the same stored bits of keys "
        "(log-linear between its budgets); below 1 is better than uniform bits."
    ).add("", ratios(rows).round(3))
