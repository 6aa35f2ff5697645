"""Block-GTQ Table 6: reasoning at K3V2 with and without exact first and last tokens; written arithmetic on the stand-in."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import committed, scores, style

QUANTS = ("tq_mse", "blockgtq", "kivi_scale_only")
WINDOWS = ("sink", "window")


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    found = scores.gather(results, model, {"aime": "score"}, QUANTS, allowed=WINDOWS)
    runs = committed.load(results, model=model, task="aime").drop_duplicates("run")
    exact = dict(zip(zip(runs["quant"], runs["bits_total"]), committed.option(runs, "quant.window", 0)))
    return found.assign(window=[exact.get((r.quant, r.bits_total), 0) for r in found.itertuples()])


def draw(rows: pd.DataFrame):
    """Bars: methods side by side, no buffer and protected."""
    part = rows[(rows["key_bits"] == 3) & (rows["value_bits"] == 2)] if ((rows["key_bits"] == 3) & (rows["value_bits"] == 2)).any() else rows
    figure, axis = plt.subplots(figsize=(style.COLUMN, 2.4))
    windows = sorted(part["window"].unique())
    for place, (quant, group) in enumerate(part.groupby("quant")):
        cells = group.groupby("window").agg(y=("value", "mean"), e=("stderr", "mean"))
        x = [windows.index(w) + (place - (part["quant"].nunique() - 1) / 2) * 0.26 for w in cells.index]
        axis.bar(x, cells.y, 0.24, yerr=cells.e.fillna(0), color=style.color(quant), label=style.label(quant), capsize=2, error_kw={"elinewidth": 0.8})
    axis.axhline(part["fp16"].mean(), color=style.color("fp16"), linestyle="--", linewidth=0.8, label="fp16")
    axis.set_xticks(range(len(windows)), ["no exact tokens" if not w else f"first 4 and last {w} exact" for w in windows])
    axis.set_ylabel("written arithmetic (percent)")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def table(rows: pd.DataFrame):
    caption = "Written arithmetic in percent, no exact tokens (the paper's budget is K3V2; the figure has it with exact tokens as well)."
    made = scores.tabulate(rows[rows["window"] == 0], caption, [("aime", "arithmetic")], 1)
    return made.add("Reported (Block-GTQ Table 6, avg@8 in percent)", scores.published("blockgtq", "T6", index=["model", "dataset", "regime"], columns="method"))
