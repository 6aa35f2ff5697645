"""GSRQ Figure 2: energy captured by k-means entries against piece size, of the original and of its first residual.

The paper calls it the ratio of squared norms of entry and members, and reads a low ratio as a fault of the mean. Over occupancy the ratio
*is* one minus the relative error, for any clustering: it falls because fewer bits per dimension must capture less.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import reported, stages, style
from experiments.tables import Table

SIGNALS = {1: "original", 2: "first residual"}


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    found = stages.shaped(stages.gather(results, model, ("km",), ("captured",)))
    return found[(found["start"] == "kmeans++") & found["stage"].isin(SIGNALS) & (found["split"] == "train")] if len(found) else found


def draw(rows: pd.DataFrame):
    figure, axes = plt.subplots(1, 2, figsize=(style.PAGE, 2.5), sharey=True)
    paper = reported.on(rows["model"].iloc[0], reported.table("gsrq", "Fig2a", "Fig2b"))
    for axis, (stage, signal) in zip(axes, SIGNALS.items()):
        ends = []
        for kind, colour, mark in (("value", "#D55E00", "s"), ("key", "#0072B2", "o")):
            for entries, line in ((256, "-"), (1024, "--")):
                part = rows[(rows["stage"] == stage) & (rows["kind"] == kind) & (rows["entries"] == entries)].groupby("piece").agg(y=("value", "mean"), e=("stderr", "mean"))
                if part.empty:
                    continue
                axis.errorbar(
                    part.index,
                    part.y,
                    yerr=part.e,
                    color=colour,
                    linestyle=line,
                    marker=mark,
                    markerfacecolor="none" if kind == "key" else None,
                    markersize=6 if kind == "key" else 3,
                    capsize=2,
                    elinewidth=0.8,
                )
                ends.append((float(part.y.iloc[-1]), f"{kind}s, K = {entries}", colour))
                seen = paper[(paper["tensor"] == kind) & (paper["signal"] == ("original" if stage == 1 else "residual1")) & (paper["K"] == str(entries))] if len(paper) else paper
                axis.plot(pd.to_numeric(seen["D"]) if len(seen) else [], seen["value"] if len(seen) else [], "x", color=colour)
        axis.set_ylim(0, 1)
        style.plain_log(axis)
        axis.set_xticks(sorted(rows["piece"].unique()), [str(p) for p in sorted(rows["piece"].unique())])
        axis.minorticks_off()
        axis.set_xlabel("piece size D (channels)")
        axis.set_title(signal)
        style.name_ends(axis, ends)
    axes[0].set_ylabel("captured energy, mean of layers")
    return figure


def table(rows: pd.DataFrame) -> Table:
    wide = (
        rows.assign(signal=rows["stage"].map(SIGNALS), value=rows["value"].round(3)).pivot_table(index=["kind", "signal", "entries"], columns="piece", values="value").reset_index()
    )
    wide.columns = [f"D={c}" if isinstance(c, int) else c for c in wide.columns]
    paper = reported.table("gsrq", "Fig2a", "Fig2b").pivot_table(index=["tensor", "signal", "K"], columns="D", values="value", sort=False).reset_index()
    return (
        Table("Captured energy of k-means entries (k-means++ start) on calibration text, mean of layers.")
        .add("Here", wide)
        .add("Reported (GSRQ Figure 2, Llama-3-8B, read off the plot)", paper)
    )
