"""Block-GTQ Figure 2, Tables 2, 3, 14, 16 and 17: how much calibration text the widths need, where it starts and what it is."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import committed, reported, scores, style
from experiments.tables import Table, spread

DISTANCES = {"hamming": "blocks of another width", "regret": "regret (share of the objective)"}
SOURCES = {"standin:mixed": ("#0072B2", "o", "task mix"), "standin:train": ("#D55E00", "s", "plain text")}


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """Means over layers of the distances, loss and needles, per calibration: source, tokens, offset."""
    frame = committed.shipped(committed.load(results, model=model, quant="blockgtq", task=["allocation", "perplexity", "niah"]))
    wanted = {"allocation": [*DISTANCES, "high_jaccard"], "perplexity": ["loss_minus_fp16"], "niah": ["score"]}
    frame = frame[[r.metric in wanted[r.task] for r in frame.itertuples()]]
    if frame.empty:
        return frame
    several = frame.groupby(["run", "metric"])["subset"].transform("nunique") > 1
    frame = frame[~several | (frame["subset"] == "average")]
    frame = frame.assign(**{name: committed.option(frame, f"calib.{name}") for name in ("samples", "length", "offset", "source")})
    frame = frame[frame["samples"] == 1].rename(columns={"length": "tokens"})
    return frame[["task", "metric", "bits", "source", "tokens", "offset", "value", "stderr", "model"]].sort_values(
        ["metric", "bits", "source", "tokens", "offset"], ignore_index=True
    )


def draw(rows: pd.DataFrame):
    """Mean and range over the places in the text, per budget (solid 3 bits, dashed 2) and kind of text."""
    panels = [*DISTANCES.items(), ("loss_minus_fp16", scores.LOSS)]
    panels = [p for p in panels if (rows["metric"] == p[0]).any()]
    figure, axes = plt.subplots(1, len(panels), figsize=(style.PAGE, 2.6))
    for axis, (metric, title) in zip(axes, panels):
        for source, (colour, mark, text) in SOURCES.items():
            for bits, line in ((3.0, "-"), (2.0, "--")):
                part = rows[(rows["metric"] == metric) & (rows["source"] == source) & (rows["bits"] == bits)].groupby("tokens")["value"].agg(["mean", "min", "max"])
                if len(part):
                    axis.errorbar(
                        part.index,
                        part["mean"],
                        [part["mean"] - part["min"], part["max"] - part["mean"]],
                        color=colour,
                        marker=mark,
                        linestyle=line,
                        capsize=2,
                        elinewidth=0.8,
                        label=f"{text}, {bits:g} bits",
                    )
        style.plain_log(axis)
        axis.set_xticks(sorted(rows["tokens"].unique()), [str(t) for t in sorted(rows["tokens"].unique())])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel("calibration tokens")
        axis.set_ylabel(title)
    named = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=4)
    return figure


def table(rows: pd.DataFrame) -> Table:
    wide = rows.groupby(["metric", "bits", "source", "tokens"])["value"].apply(lambda v: spread(v, digits=4)).unstack("tokens").reset_index().fillna("")
    wide.columns = [str(c) for c in wide.columns]
    made = Table(
        "Distances to the allocation of 16,384 tokens of the task mix, loss above fp16 (nats per token) and needles found (percent); "
        "mean ± standard deviation over three places in the text."
    ).add("Here", wide)
    made.add("Reported, needles found (Block-GTQ Table 2)", scores.published("blockgtq", "T2a", "T2b", index=["metric", "ncal", "corpus"], columns="budget"))
    paper = reported.table("blockgtq", "T3")
    made.add(
        "Reported, perplexity (Block-GTQ Table 3)",
        paper[paper["metric"] == "ppl_mean"].pivot_table(index=["model", "budget"], columns="ncal", values="value", sort=False).reset_index(),
    )
    return made.add(
        "Reported, distances at K3V3 (Block-GTQ Table 17)",
        reported.table("blockgtq", "T17").pivot_table(index=["model", "ncal", "offset"], columns="metric", values="value", sort=False).reset_index(),
    )
