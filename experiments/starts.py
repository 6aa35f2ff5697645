"""Is GSKM's gain the update rule or the start? Plain k-means from three starts beside GSKM and GSRQ, seeds as error bars, loss and needles."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import choice, style
from kvq import results as store

ARMS = {
    "km random": ("#E69F00", "s", "k-means, random start"), "km kmeans++": ("#D55E00", "^", "k-means++"),
    "km spherical": ("#56B4E9", "D", "k-means, spherical start"), "gskm": ("#009E73", "v", "GSKM"), "gsrq": ("#0072B2", "o", "GSRQ (log weights)"),
}  # fmt: skip
PANELS = (("perplexity", "loss_minus_fp16", "held-out loss above fp16 (nats)"), ("niah", "score", "needles found (%)"))


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """Stand-in runs of km (any start), gskm and gsrq with three seeds: task, arm, bits, seed, value."""
    frame = store.load(results, model=model, data="embedded", quant=["km", "gskm", "gsrq"], task=[p[0] for p in PANELS])
    parts = [choice.averages(frame[frame.task == task], metric) for task, metric, _ in PANELS]
    frame = pd.concat(parts) if len(frame) else frame
    if frame.empty:
        return frame
    allowed = {"key.cluster.start", "value.cluster.start"}
    frame = frame[[set(choice.changes(r.quant, r.config)) <= allowed for r in frame.itertuples()]]
    arm = [f"km {json.loads(r.config)['quant']['key']['cluster']['start']}" if r.quant == "km" else r.quant for r in frame.itertuples()]
    return frame.assign(arm=arm)[["task", "arm", "bits", "seed", "value"]].sort_values(["task", "arm", "bits", "seed"], ignore_index=True)


def draw(rows: pd.DataFrame):
    """Mean and range over seeds, the arms side by side at every budget."""
    panels = [p for p in PANELS if (rows.task == p[0]).any()]
    figure, axes = plt.subplots(1, len(panels), figsize=(style.PAGE if len(panels) > 1 else style.COLUMN, 2.8), squeeze=False)
    axes = axes[0]
    budgets = sorted(rows.bits.unique())
    for axis, (task, _, title) in zip(axes, panels):
        for place, (arm, (color, marker, label)) in enumerate(ARMS.items()):
            part = rows[(rows.task == task) & (rows.arm == arm)].groupby("bits").value.agg(["mean", "min", "max"])
            if part.empty:
                continue
            x = [budgets.index(b) + (place - 2) * 0.13 for b in part.index]
            spread = [part["mean"] - part["min"], part["max"] - part["mean"]]
            axis.errorbar(x, part["mean"], yerr=spread, color=color, marker=marker, linestyle="none", label=label, capsize=2, elinewidth=0.8)
        axis.set_xticks(range(len(budgets)), [f"{b:g}" for b in budgets])
        axis.set_xlabel("nominal bits per value")
        axis.set_ylabel(title)
        axis.set_title(f"{rows[rows.task == task].seed.nunique()} seed(s)", loc="right")
        if task == "perplexity":
            axis.set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5 if len(panels) > 1 else 2)
    return figure
