"""GSRQ Figure 6: strength tau of the log weights, beside raw gradient norms and no weights; every arm with its seeds."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import committed, reported, scores, style
from experiments.tables import Table, spread

TAUS = (0.01, 0.1, 1.0, 10.0, 100.0)
OPTIONS = tuple(f"{kind}.{name}" for kind in ("key", "value") for name in ("tau", "weights"))


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    frame = committed.load(results, model=model, task="perplexity", quant=["gsrq", "gskm"], metric="loss_minus_fp16")
    frame = committed.one_setting(committed.shipped(frame, OPTIONS))
    if frame.empty:
        return frame
    weights, tau = committed.option(frame, "quant.key.weights"), committed.option(frame, "quant.key.tau", 1.0)
    arm = [w if w != "log" else f"{t:g}" for w, t in zip(weights, tau)]
    frame = frame.assign(arm=arm)[["arm", "bits", "seed", "value", "stderr", "model"]]
    swept = frame.groupby("bits")["arm"].nunique()
    return frame[frame["bits"].isin(swept[swept >= 5].index)].sort_values(["bits", "arm", "seed"], ignore_index=True)


def draw(rows: pd.DataFrame):
    budgets = sorted(rows["bits"].unique())
    figure, axes = plt.subplots(1, len(budgets), figsize=(style.COLUMN * min(len(budgets), 2), 2.5), squeeze=False)
    for axis, bits in zip(axes[0], budgets):
        part = rows[rows["bits"] == bits].groupby("arm")["value"].agg(["mean", "min", "max"])
        line = part.reindex([f"{t:g}" for t in TAUS]).dropna()
        axis.errorbar(
            [float(t) for t in line.index],
            line["mean"],
            [line["mean"] - line["min"], line["max"] - line["mean"]],
            color=style.color("gsrq"),
            marker=style.marker("gsrq"),
            capsize=2,
        )
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
        axis.minorticks_off()
        ends = [(float(line["mean"].iloc[-1]), "log weights", style.color("gsrq"))]
        for arm, colour, text in (("raw", "#D55E00", "raw gradients"), ("none", style.color("gskm"), "no weights")):
            if arm in part.index:
                axis.axhline(part.loc[arm, "mean"], color=colour, linestyle="--", linewidth=1)
                axis.axhspan(part.loc[arm, "min"], part.loc[arm, "max"], color=colour, alpha=0.15, linewidth=0)
                ends.append((part.loc[arm, "mean"], text, colour))
        axis.set_xlabel("strength tau")
        axis.set_title(style.bits(bits))
        style.name_ends(axis, ends)
    axes[0][0].set_ylabel(scores.LOSS)
    return figure


def table(rows: pd.DataFrame) -> Table:
    wide = rows.groupby(["bits", "arm"])["value"].apply(spread).unstack("bits").reset_index()
    wide.columns = [c if isinstance(c, str) else f"{c:g} bits" for c in wide.columns]
    return Table("Loss above fp16 (nats per token) by strength of the log weights: mean ± standard deviation over seeds.").add("Here", wide).add(
        "Reported, perplexity (GSRQ Figure 6, Llama-3-8B, one run each)", reported.table("gsrq", "Fig6a", "Fig6b")[["budget", "method", "tau", "value"]])  # fmt: skip
