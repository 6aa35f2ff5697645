"""GSRQ Figure 5: k-means and GSKM on the model's keys and values by piece size, from both starts, original and first residual.

The paper gives each method its own start. With the start crossed, the distance between lines of one colour is the start's and the distance
between colours the update's.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import reported, stages, style
from experiments.tables import Table

METRICS = {"captured": "captured energy", "gain_error": "gain error\n(norm units)", "cosine": "cosine"}
ARMS = {("km", "kmeans++"): "-", ("km", "spherical"): "--", ("gskm", "kmeans++"): ":", ("gskm", "spherical"): "-."}


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    found = stages.shaped(stages.gather(results, model, ("km", "gskm"), (*METRICS, "mse", "entropy")))
    return found[found["stage"].isin((1, 2))] if len(found) else found


def draw(rows: pd.DataFrame):
    """K = 256, held out: metrics down; keys and values, original and residual across."""
    columns = [(kind, stage) for kind in ("key", "value") for stage in (1, 2)]
    part = rows[(rows["entries"] == 256) & (rows["split"] == "heldout")]
    figure, axes = plt.subplots(3, 4, figsize=(style.PAGE, 4.6), sharex=True)
    for line, (metric, title) in zip(axes, METRICS.items()):
        for axis, (kind, stage) in zip(line, columns):
            for (quant, start), dash in ARMS.items():
                cells = part[(part["metric"] == metric) & (part["kind"] == kind) & (part["stage"] == stage) & (part["quant"] == quant) & (part["start"] == start)]
                cells = cells.groupby("piece")["value"].mean()
                word = "k-means" if quant == "km" else "GSKM"
                axis.plot(cells.index, cells, color=style.color(quant), linestyle=dash, marker=style.marker(quant), markersize=3, label=f"{word}, {start} start")
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted(part["piece"].unique()), [str(p) for p in sorted(part["piece"].unique())])
            axis.minorticks_off()
            if metric == "captured":
                axis.set_title(f"{kind}s, {'original' if stage == 1 else 'first residual'}")
            if metric == "cosine":
                axis.set_xlabel("piece size D")
        line[0].set_ylabel(title)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def table(rows: pd.DataFrame) -> Table:
    cells = rows[rows["entries"] == 256].assign(signal=rows["stage"].map({1: "original", 2: "first residual"}))
    wide = cells.pivot_table(index=["kind", "signal", "piece", "quant", "start", "split"], columns="metric", values="value").round(4).reset_index()
    control = reported.table("gsrq", "Fig5-extra", metric="mse_per_element", model="Llama-3-8B")
    control = (
        control[control["method"].isin(["KM", "KM-spherical-start", "GSKM"])]
        .pivot_table(index=["tensor", "signal", "D", "K"], columns="method", values="value", sort=False)
        .reset_index()
    )
    return (Table("Reconstruction per stage, K = 256, mean of layers; mse is relative to the energy of the original.").add("Here", wide)
            .add("The authors' own unpublished control: k-means from a spherical start, mean squared error per element (Llama-3-8B, training vectors)", control))  # fmt: skip
