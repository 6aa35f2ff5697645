"""GSRQ Figure 3: how far gradient norms spread around their median, and how far the log weights do."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import committed, reported, style
from experiments.tables import Table

WEIGHTS = {"raw": ("#D55E00", "s", "gradient norm"), "log": ("#0072B2", "o", "log weight")}


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    frame = committed.load(results, model=model, task="gradients")
    return frame[frame["subset"].isin(["key", "value"])][["quant", "bits", "subset", "metric", "value", "stderr", "run", "model"]].sort_values(
        ["quant", "bits", "subset", "metric"]
    )


def draw(rows: pd.DataFrame):
    """Share of vectors beyond a multiple of the median, mean of layers; both axes logarithmic so that the tail is seen."""
    reference = rows[rows["quant"] == "fp16"]
    figure, axes = plt.subplots(1, 2, figsize=(style.PAGE, 2.5), sharey=True)
    for axis, kind in zip(axes, ("key", "value")):
        for weight, (colour, mark, text) in WEIGHTS.items():
            part = reference[(reference["subset"] == kind) & reference["metric"].str.startswith(f"{weight}/")]
            level = part["metric"].str.split("/").str[1].astype(float)
            tail = (1 - level).clip(lower=1e-4)
            order = level.argsort().to_numpy()
            axis.plot(part["value"].to_numpy()[order], tail.to_numpy()[order], color=colour, marker=mark)
            largest = float(part["value"].to_numpy()[order][-1])
            height = 0.95 if weight == "raw" else 0.86
            axis.text(0.98, height, f"{text}, largest {largest:.3g} medians", transform=axis.transAxes, ha="right", va="top", color=colour, fontsize=7)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(f"{kind} vectors: multiple of the median")
    axes[0].set_ylabel("share of vectors above\n(last point: the largest)")
    return figure


def table(rows: pd.DataFrame) -> Table:
    wide = (
        rows[rows["metric"].isin(["error_none", "error_raw", "error_log"]) & (rows["quant"] != "fp16")]
        .assign(value=rows["value"].round(4))
        .pivot_table(index=["quant", "bits", "subset"], columns="metric", values="value")
        .reset_index()
    )
    largest = (
        rows[(rows["quant"] == "fp16") & rows["metric"].isin(["raw/1", "log/1"])]
        .assign(value=rows["value"].round(1))
        .pivot_table(index="subset", columns="metric", values="value")
        .reset_index()
    )
    return (Table("Gradient norms (raw) and log weights in units of their median; relative squared error of codecs, weighted by each (error_none: not weighted).")
            .add("Largest over median, mean of layers", largest)
            .add("Reported (GSRQ Figure 3, Llama-3-8B)", reported.table("gsrq", "Fig3a", "Fig3b")[["tensor", "method", "value"]])
            .add("Relative error under each weight", wide))  # fmt: skip
