"""Block-GTQ Figure 8 and Table 10: entropy of a layer's widths, and how many distinct widths it has."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import reported, style, widths
from experiments.tables import Table


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    return widths.gather(results, model)


def draw(rows: pd.DataFrame):
    figure, (left, right) = plt.subplots(1, 2, figsize=(style.PAGE, 2.3))
    for axis, metric, title in ((left, "entropy", "entropy of the widths (bits)"), (right, "groups", "distinct widths")):
        ends = []
        for bits, mark, line in ((3.0, "o", "-"), (2.0, "s", "--")):
            part = rows[rows["bits"] == bits].groupby("layer")[metric].mean()
            axis.plot(part.index, part, color=style.color("blockgtq"), marker=mark, linestyle=line, label=f"{bits:g} bits on average")
            ends.append((float(part.iloc[-1]), f"{bits:g} bits", style.color("blockgtq")))
        axis.set_xlabel("layer")
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0)
        axis.set_xticks(sorted(rows["layer"].unique()))
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


def table(rows: pd.DataFrame) -> Table:
    lines = []
    for bits, part in rows.groupby("bits"):
        by = part.groupby("layer")["entropy"].mean()
        lines.append({"bits": bits, "layers": len(by), "distinct widths": round(part["groups"].mean(), 2), "entropy": round(by.mean(), 3), "std": round(by.std(), 3),
                      "largest at layer": f"{by.max():.2f} @{by.idxmax()}", "smallest at layer": f"{by.min():.2f} @{by.idxmin()}"})  # fmt: skip
    paper = reported.table("blockgtq", "T10")
    paper = paper[paper["metric"].isin(["distinct_widths_per_layer_mean", "entropy_mean", "entropy_std", "entropy_max", "entropy_min"])]
    return Table("Entropy of the widths of a layer's blocks, heads pooled.").add("Here", pd.DataFrame(lines)).add(
        "Reported at 3 bits (Block-GTQ Table 10)", paper.pivot_table(index="model", columns="metric", values="value", sort=False).reset_index())  # fmt: skip
