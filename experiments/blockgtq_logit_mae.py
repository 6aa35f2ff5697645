"""Block-GTQ Tables 1 and 11: logit error of the keys, Block-GTQ against uniform TQ-MSE: layers and heads won, and what it costs in bytes.

Left: logit MAE per layer at equal code bits, the paper's comparison. Right: the same errors against *stored* bits, which include one norm
per width group and head; the dashed line joins TQ-MSE's budgets, so a point below it is better at equal bytes.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments import heads, reported, style
from experiments.tables import Table

METHODS = ("tq_mse", "blockgtq", "blockgtq_plus")


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    return heads.gather(results, model, "logit_mae", METHODS)


def draw(rows: pd.DataFrame):
    figure, (left, right) = plt.subplots(1, 2, figsize=(style.PAGE, 2.7))
    budgets = sorted(b for b in rows["key_bits"].unique() if b == int(b))
    for quant in METHODS:
        for bits, line in zip(budgets, ("-", "--", ":", "-.")):
            part = rows[(rows["quant"] == quant) & (rows["key_bits"] == bits)]
            by_layer = part.groupby(["layer", "seed"])["logit_mae"].mean().groupby("layer").agg(["mean", "std"])
            if len(by_layer):
                style.points(left, by_layer.index, by_layer["mean"], by_layer["std"], quant, text=f"{style.label(quant)}, {bits:g} bits", line=line)
    left.set_xlabel("layer")
    left.set_ylabel("logit MAE (before softmax)")
    style.plain_log(left, "y", 10)
    cells, ends = heads.means(rows, "logit_mae"), []
    for quant in METHODS:
        if quant in cells.index.get_level_values(0):
            mine = cells.loc[quant]
            style.points(right, mine.x, mine.y, mine.spread, quant, line="--" if quant == "tq_mse" else "none")
            ends.append((float(mine.y.iloc[-1]), style.label(quant), style.color(quant)))
    right.set_xlabel("stored bits per key value (codes and norms)")
    right.set_ylabel("logit MAE, mean of heads")
    style.plain_log(right, "y", 10)
    style.name_ends(right, ends)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def equal_bytes(cells: pd.DataFrame, bits: float) -> float:
    """TQ-MSE's error at Block-GTQ's stored bits, log-linear between its budgets; NaN outside them."""
    tq, ours = cells.loc["tq_mse"], cells.loc[("blockgtq", bits)]
    return float(np.exp(np.interp(ours.x, tq.x, np.log(tq.y)))) if tq.x.min() <= ours.x <= tq.x.max() else float("nan")


def table(rows: pd.DataFrame) -> Table:
    cells, lines = heads.means(rows, "logit_mae"), []
    for bits, won in heads.wins(rows, "logit_mae").iterrows():
        ours, theirs = cells.loc[("blockgtq", bits)], cells.loc[("tq_mse", bits)]
        lines.append({"code bits": bits, "layers won": f"{won.layers:.0f}/{won.of_layers:.0f}", "heads won": f"{won.heads:.0f}/{won.of_heads:.0f}",
                      "reduction": f"{won.reduction:.1%}", "TQ-MSE stored": f"{theirs.x:.3f}", "Block-GTQ stored": f"{ours.x:.3f}",
                      "MAE TQ-MSE": f"{theirs.y:.3f} ± {theirs.spread:.3f}",
                      "MAE Block-GTQ": f"{ours.y:.3f} ± {ours.spread:.3f}", "MAE TQ-MSE at Block-GTQ's bytes": f"{equal_bytes(cells, bits):.3f}".replace("nan", "")})  # fmt: skip
    caption = "Keys only; calibrated and scored on different texts; ± is the standard deviation over seeds (rotations). Equal bytes by log-linear interpolation."
    plus = cells.loc["blockgtq_plus"].reset_index().round(3) if "blockgtq_plus" in cells.index.get_level_values(0) else pd.DataFrame()
    made = Table(caption).add("", pd.DataFrame(lines))
    if len(plus):
        made.add("Block-GTQ+ (ours)", plus.rename(columns={"key_bits": "code bits", "x": "stored", "y": "MAE", "spread": "std"}))
    paper = reported.table("blockgtq", "T1", "T11")
    paper = paper[paper["metric"].isin(["rope_logit_mae", "mae_reduction", "layer_wins"])]
    return made.add(
        "Reported (Block-GTQ Tables 1 and 11)", paper.pivot_table(index=["model", "budget"], columns=["method"], values="value", sort=False, aggfunc="first").reset_index()
    )


def wins(rows: pd.DataFrame) -> pd.DataFrame:
    """Per budget: layers and heads that Block-GTQ wins, of how many, and the mean reduction."""
    found = heads.wins(rows, "logit_mae")
    return found.assign(layer_share=found["layers"] / found["of_layers"], head_share=found["heads"] / found["of_heads"])
