"""Partial sums kept while encoding, 1 to 8: error, loss and what encoding takes. The decoder does not change."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import committed, scores, style
from experiments.tables import Table

OPTIONS = ("key.beam", "value.beam")


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """Long: beam, bits, metric (relative error of keys and values, held out; loss; task seconds), value, stderr."""
    frame = committed.load(results, model=model, task=["reconstruction", "perplexity"], quant="gskm")
    frame = committed.one_setting(committed.shipped(frame, OPTIONS))
    if frame.empty:
        return frame
    wanted = (frame["task"] == "reconstruction") & (frame["metric"] == "relative") & frame["subset"].isin(["key heldout", "value heldout"])
    wanted |= (frame["task"] == "perplexity") & (frame["metric"].isin(["loss_minus_fp16", "task_seconds"]))
    frame = frame[wanted].assign(beam=committed.option(frame[wanted], "quant.key.beam"))
    frame = frame.assign(metric=[r.subset.split()[0] if r.task == "reconstruction" else r.metric for r in frame.itertuples()])
    swept = frame.groupby("bits")["beam"].nunique()
    return frame[frame["bits"].isin(swept[swept > 1].index)][["beam", "bits", "metric", "value", "stderr", "device", "model"]].sort_values(
        ["metric", "bits", "beam"], ignore_index=True
    )


def draw(rows: pd.DataFrame):
    panels = (
        ("error", ("key", "value"), "held-out squared error\n(share of the energy)"),
        ("loss", ("loss_minus_fp16",), scores.LOSS),
        ("time", ("task_seconds",), "seconds, perplexity run\n(fp16 reference included)"),
    )
    panels = [p for p in panels if rows["metric"].isin(p[1]).any()]
    figure, axes = plt.subplots(1, len(panels), figsize=(style.PAGE, 2.3), squeeze=False)
    for axis, (_, metrics, title) in zip(axes[0], panels):
        ends = []
        for metric in metrics:
            for bits, part in rows[rows["metric"] == metric].groupby("bits"):
                line = part.groupby("beam").agg(y=("value", "mean"), e=("stderr", "mean"))
                colour = {"key": "#0072B2", "value": "#D55E00"}.get(metric, style.color("gskm"))
                axis.errorbar(line.index, line.y, None if metric == "task_seconds" else line.e.fillna(0), color=colour, marker="o", capsize=2, elinewidth=0.8)
                ends.append((float(line.y.iloc[-1]), f"{metric}s" if metric in ("key", "value") else f"{bits:g} bits", colour))
        axis.set_ylim(bottom=0)
        style.plain_log(axis)
        axis.set_xticks(sorted(rows["beam"].unique()), [str(b) for b in sorted(rows["beam"].unique())])
        axis.minorticks_off()
        axis.set_xlabel("beam width")
        axis.set_ylabel(title)
        style.name_ends(axis, ends)
    return figure


def table(rows: pd.DataFrame) -> Table:
    wide = rows.pivot_table(index=["bits", "beam"], columns="metric", values="value").round(4).reset_index()
    return Table(f"GSKM encoded with a beam; relative squared error held out, loss above fp16 in nats, seconds of the whole perplexity run on {rows['device'].iloc[-1]}.").add(
        "", wide
    )
