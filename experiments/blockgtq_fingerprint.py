"""Block-GTQ Figures 3 and 7, Tables 8 and 9: shares of the widths in every layer, at 3 and 2 bits on average."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import reported, style, widths
from experiments.tables import Table


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    return widths.gather(results, model)


def draw(rows: pd.DataFrame):
    budgets = sorted(rows["bits"].unique(), reverse=True)
    figure, axes = plt.subplots(1, len(budgets), figsize=(style.PAGE, 2.5), squeeze=False, sharey=True)
    for axis, bits in zip(axes[0], budgets):
        part = rows[rows["bits"] == bits].groupby("layer").mean(numeric_only=True)
        bottom = 0 * part.index
        for width in range(1, 9):
            share = 100 * part[f"width/{width}"]
            bars = axis.bar(part.index, share, bottom=bottom, color=widths.SHADES[width - 1], edgecolor="0.4", linewidth=0.3, label=f"{width}")
            for bar, value, start in zip(bars, share, bottom):
                if value >= 8:
                    axis.text(bar.get_x() + bar.get_width() / 2, start + value / 2, f"{width}", ha="center", va="center", fontsize=6, color="white" if width > 5 else "black")
            bottom = bottom + share
        axis.set_title(f"{bits:g} bits on average")
        axis.set_xlabel("layer")
        axis.set_xticks(list(part.index))
        axis.grid(False)
    axes[0][0].set_ylabel("blocks (percent)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", title="width\n(bits)")
    return figure


def table(rows: pd.DataFrame) -> Table:
    names = [f"width/{w}" for w in range(1, 9)]
    here = rows.groupby("bits")[[*names, "entropy", "groups"]].mean()
    here[names] = (100 * here[names]).round(1)
    made = Table("Shares of the widths in percent of all blocks, entropy in bits and distinct widths per layer.").add("Here", here.round(3).reset_index())
    for name, bits in (("T8", 3), ("T9", 2)):
        paper = reported.table("blockgtq", name, metric="width_share").pivot_table(index="model", columns="bits", values="value", sort=False).reset_index()
        made.add(f"Reported at {bits} bits (Block-GTQ Table {name[1:]})", paper)
    return made


def shares(rows: pd.DataFrame) -> pd.DataFrame:
    """Share of blocks at the mean width, mean of layers, per budget."""
    return pd.DataFrame([{"bits": bits, "at_mean": part[f"width/{bits:g}"].mean()} for bits, part in rows.groupby("bits")])
