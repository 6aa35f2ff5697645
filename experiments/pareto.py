"""Which quantizer at which budget: score and loss of every method found, against stored bits and against all-in bits.

Stored bits are what a token costs in a running cache; all-in bits add codebooks and exact tokens for one sequence of the run's
length, where vector quantizers pay for their tables.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import choice, style
from kvq import results as store

EXTRAS = {"perplexity": ("loss_minus_fp16", "top1", "kl")}
PANELS = (("perplexity", "loss", "held-out loss above fp16\n(nats per token)"), ("longbench", "score", "LongBench score\n(percent of 100)"), ("niah", "score", "needles found\n(percent)"))
FEWEST = 3
"""Quantized runs a task needs before it gets panels."""
AXES = (("bits_stored", "stored bits per value"), ("bits_total", "all-in bits per value, one sequence"))


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """Default-option runs of the stand-in on embedded data: one row per run with its average score."""
    frame = store.load(results, model=model, data="embedded", task=[task for task, _, _ in PANELS])
    if frame.empty:
        return frame
    frame = choice.default_runs(frame)
    keep = [choice.averages(frame[frame.task == task], name) for task, metric, _ in PANELS for name in (metric, f"{metric}_fp16", *EXTRAS.get(task, ()))]
    return pd.concat(keep).sort_values(["task", "quant", "bits", "seed"], ignore_index=True)


def draw(rows: pd.DataFrame):
    """One row of panels per task: left against stored bits, right against all-in bits (log scale)."""
    lossy = rows[~rows["quant"].isin(["fp16", "zero"])].groupby("task")["run"].nunique()
    tasks = [p for p in PANELS if lossy.get(p[0], 0) >= FEWEST]
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
    shown = f"{metric}_minus_fp16" if loss else metric  # the paired difference: its error is not that of the text
    for quant, group in part[(part.metric == shown) & ~part["quant"].isin(["fp16", "zero"])].groupby("quant"):
        cells = group.groupby("bits").agg(x=(column, "mean"), y=("value", "mean"), spread=("value", "std"), n=("value", "size"), stderr=("stderr", "mean"))
        error = cells.spread.where(cells.n > 1, cells.stderr)
        axis.errorbar(cells.x, cells.y, yerr=error, color=style.color(quant), marker=style.marker(quant), label=style.label(quant), capsize=2, elinewidth=0.8)
    if loss:
        axis.set_yscale("symlog", linthresh=1e-3)  # differences below a thousandth, and negative ones, stay on the axis
    else:
        axis.axhline(reference, color=style.color("fp16"), linestyle="--", linewidth=0.8, label="fp16")
        axis.set_ylim(bottom=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")


def table(rows: pd.DataFrame) -> str:
    """Markdown: one line per method and budget, mean over seeds; loss as the difference to fp16 on the same tokens."""
    columns = [("perplexity", "loss", "loss above fp16 (nats)", "{:+.3f}"), ("perplexity", "kl", "KL to fp16 (nats)", "{:.3f}"),
               ("perplexity", "top1", "top-1 agreement", "{:.3f}"), ("longbench", "score", "LongBench", "{:.1f}"), ("niah", "score", "needles", "{:.1f}")]  # fmt: skip
    lines = ["| method | bits | stored | all-in, one 2K sequence | " + " | ".join(c[2] for c in columns) + " | seeds |", "|---" * (len(columns) + 5) + "|"]
    fp16 = {task: rows[(rows.task == task) & (rows.metric == f"{metric}_fp16")].value.mean() for task, metric, _ in PANELS}
    text = rows[rows.task == "perplexity"]
    for (quant, bits), group in rows[rows["quant"] != "zero"].groupby(["quant", "bits"]):
        cells = []
        for task, metric, _, form in columns:
            value = group[(group.task == task) & (group.metric == metric)].value.mean()
            cells.append("" if pd.isna(value) else form.format(value - fp16[task] if metric == "loss" and quant != "fp16" else value))
        total = text[(text["quant"] == quant) & (text.bits == bits)].bits_total.mean()
        lines.append(f"| {style.label(quant)} | {bits:g} | {group.bits_stored.mean():.3f} | {total:.2f} | " + " | ".join(cells) + f" | {group.seed.nunique()} |")
    return "\n".join(["Stand-in model, embedded data; fp16 in its own row (its loss is absolute). One pass, so KIVI's exact window of 128 tokens is seen by the last queries only: its loss is overstated against token-by-token scoring, and no other method here has a window. Generated by `make figures`.", "", *lines, ""])
