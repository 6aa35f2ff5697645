"""Which quantizer at which budget: score and loss of every method found, against stored bits and against all-in bits.

Stored bits are what a token costs in a running cache; all-in bits add codebooks and exact tokens for one sequence of the run's
length, where vector quantizers pay for their tables.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import choice, style
from kvq import results as store

PANELS = (("perplexity", "loss", "held-out loss above fp16\n(nats per token)"), ("longbench", "score", "LongBench score\n(percent of 100)"), ("niah", "score", "needles found\n(percent)"))
AXES = (("bits_stored", "stored bits per value"), ("bits_total", "all-in bits per value, one sequence"))


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """Default-option runs of the stand-in on embedded data: one row per run with its average score."""
    frame = store.load(results, model=model, data="embedded", task=[task for task, _, _ in PANELS])
    if frame.empty:
        return frame
    frame = choice.default_runs(frame)
    keep = [choice.averages(frame[frame.task == task], name) for task, metric, _ in PANELS for name in (metric, f"{metric}_fp16")]
    return pd.concat(keep).sort_values(["task", "quant", "bits", "seed"], ignore_index=True)


def draw(rows: pd.DataFrame):
    """One row of panels per task: left against stored bits, right against all-in bits (log scale)."""
    tasks = [p for p in PANELS if (rows.task == p[0]).any()]
    figure, axes = plt.subplots(len(tasks), 2, figsize=(style.PAGE, 2.3 * len(tasks)), squeeze=False, sharey="row")
    for line, (task, metric, title) in zip(axes, tasks):
        part = rows[rows.task == task]
        for axis, (column, name) in zip(line, AXES):
            _panel(axis, part, metric, column, loss=metric == "loss")
            axis.set_xlabel(name)
        line[0].set_ylabel(title)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6)
    return figure


def _panel(axis, part: pd.DataFrame, metric: str, column: str, loss: bool) -> None:
    reference = part[part.metric == f"{metric}_fp16"].value.mean()
    for quant, group in part[(part.metric == metric) & ~part["quant"].isin(["fp16", "zero"])].groupby("quant"):
        cells = group.groupby("bits").agg(x=(column, "mean"), y=("value", "mean"), spread=("value", "std"), n=("value", "size"), stderr=("stderr", "mean"))
        y = cells.y - reference if loss else cells.y
        error = cells.spread.where(cells.n > 1, cells.stderr)
        axis.errorbar(cells.x, y, yerr=error, color=style.color(quant), marker=style.marker(quant), label=style.label(quant), capsize=2, elinewidth=0.8)
    if loss:
        axis.set_yscale("log")
    else:
        axis.axhline(reference, color=style.color("fp16"), linestyle="--", linewidth=0.8, label="fp16")
        axis.set_ylim(bottom=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
