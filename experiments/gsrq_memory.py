"""GSRQ Figure 7: memory of Llama-3-8B against batch size at 1,024 tokens, by arithmetic, with the paper's points and the peaks that task=latency measured.

Weights 16.06 GB; an fp16 cache takes 131,072 bytes a token with shared KV heads and 524,288 with heads repeated; GSRQ at .75 bit takes
6,144 and its codebooks 0.403 GB once. No activations are counted by arithmetic; measured peaks hold everything a step needs.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import latency, reported, style
from experiments.tables import Table

TOKENS, WEIGHTS, VALUES = 1024, 16.06, 32 * 2 * 1024  # layers * (K, V) * width
CACHES = {
    "fp16, KV heads repeated": ("#999999", "--", 4 * 16.0, 0.0), "fp16, KV heads shared": (style.COLORS["fp16"], "-", 16.0, 0.0),
    "FP8": (style.COLORS["fp8"], "-", 8.0, 0.0), "Block-GTQ, 3 bits": (style.COLORS["blockgtq"], "-", 3.25, 0.0), "GSRQ, .75 bits": (style.COLORS["gsrq"], "-", 0.75, 0.403),
}  # fmt: skip


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """Gigabytes by cache and batch, and the paper's values as arms `paper FP16` and `paper GSRQ`. Arithmetic: the same for every results folder."""
    if model != "standin":
        return pd.DataFrame()
    ours = [{"arm": arm, "batch": batch, "value": WEIGHTS + tables + bits / 8 * VALUES * TOKENS * batch / 1e9}
            for arm, (_, _, bits, tables) in CACHES.items() for batch in (8, 16, 32, 64, 128, 256, 512)]  # fmt: skip
    paper = reported.table("gsrq", "Fig7")
    paper = pd.DataFrame({"arm": "paper " + paper["method"], "batch": paper["batch"].astype(int), "value": paper["value"]})
    return pd.concat([pd.DataFrame(ours), paper[paper["value"].notna()], measured(results)], ignore_index=True)


def measured(results: Path) -> pd.DataFrame:
    """Peaks of decoding steps of GSRQ at .75 bits in the shape of Llama-3-8B, as arm `measured GSRQ`, and of fp16 beside it; empty without rows."""
    steps = latency.steps(results, vector=True)
    if steps.empty:
        return pd.DataFrame()
    steps = latency.whole(steps)
    steps = steps[(steps["model"] == "random_llama31_8b") & (steps["quant"] == "gsrq") & (steps["bits"] == 0.75) & (steps["tokens"] == TOKENS)]
    found = [steps[["batch"]].assign(arm=arm, value=steps[column] / 1e9) for arm, column in (("measured GSRQ", "peak"), ("measured FP16", "flash_peak"))]
    return pd.concat(found).dropna().astype({"batch": int})


def draw(rows: pd.DataFrame):
    figure, axis = plt.subplots(figsize=(style.COLUMN * 1.3, 2.7))
    ends = []
    for arm, (colour, line, _, _) in CACHES.items():
        part = rows[rows["arm"] == arm]
        axis.plot(part["batch"], part["value"], color=colour, linestyle=line)
        ends.append((float(part["value"].iloc[-1]), arm, colour))
    points = (("paper FP16", "black", "x"), ("paper GSRQ", style.COLORS["gsrq"], "+"), ("measured FP16", style.COLORS["fp16"], "o"), ("measured GSRQ", style.COLORS["gsrq"], "s"))
    for arm, colour, mark in points:
        part = rows[rows["arm"] == arm]
        if len(part):
            axis.plot(part["batch"], part["value"], mark, color=colour, label=arm.replace(" ", ", "), zorder=5, markersize=4, markerfacecolor="none")
    axis.axhline(80, color="0.6", linewidth=0.8, linestyle=":")
    axis.annotate("80 GB", (8, 80), xytext=(0, 2), textcoords="offset points", fontsize=6.5, color="0.4")
    style.plain_log(axis)
    style.plain_log(axis, "y", 10)
    axis.set_yticks([20, 50, 100, 200], ["20", "50", "100", "200"])
    axis.set_xticks(sorted(rows["batch"].unique()), [str(b) for b in sorted(rows["batch"].unique())])
    axis.minorticks_off()
    axis.set_xlabel(f"batch (sequences of {TOKENS:,} tokens)")
    axis.set_ylabel("weights and cache (GB)")
    axis.legend(loc="upper left")
    style.name_ends(axis, ends)
    return figure


def table(rows: pd.DataFrame) -> Table:
    wide = rows.pivot_table(index="arm", columns="batch", values="value", sort=False).round(1).reset_index()
    wide.columns = [str(c) for c in wide.columns]
    caption = "Gigabytes of weights and cache of Llama-3-8B at 1,024 tokens by batch size: arithmetic, and the paper's Figure 7 (A100-80GB, activations included)."
    if not rows["arm"].str.startswith("measured").any():
        caption += f" No step of GSRQ at .75 bit and {TOKENS:,} tokens has been timed with its peak; gsrq_latency has the peaks of those that were."
    return Table(caption).add("", wide)
