"""Block-GTQ against uniform TurboQuant-MSE on the logits of the keys (Block-GTQ Tables 1 and 11): layers and heads won, and what it costs in bytes.

Left: logit MAE per layer at equal code bits, the paper's comparison. Right: the same errors against *stored* bits, which include one norm
per width group and head; the dashed line joins TQ-MSE's budgets, so a point below it is better at equal bytes.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import choice, style
from kvq import results as store

METHODS = ("tq_mse", "blockgtq", "blockgtq_plus")
PAPER = ("tq_mse", "blockgtq")


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """One row per (method, bits, layer, KV head): logit_mae, kl, top10 and the run's stored bits; read from the runs' predictions."""
    frame = store.load(results, model=model, task="attention", quant=list(METHODS))
    if frame.empty:
        return frame
    found = []
    for run in choice.default_runs(frame).drop_duplicates("run").itertuples():
        for line in (results / "runs" / f"{run.run}.jsonl").read_text().splitlines():
            record = json.loads(line)
            found.append({"quant": run.quant, "bits": run.bits, "bits_stored": run.bits_stored, "seed": run.seed,
                          "layer": int(record["subset"].split()[1]), "head": record["head"], **record["metrics"]})  # fmt: skip
    return pd.DataFrame(found).sort_values(["quant", "bits", "seed", "layer", "head"], ignore_index=True)


def wins(rows: pd.DataFrame) -> pd.DataFrame:
    """Per budget: heads and layers where Block-GTQ has the lower error, of how many, and the mean reduction."""
    wide = rows.pivot_table(index=["bits", "layer", "head"], columns="quant", values="logit_mae")
    if not set(PAPER) <= set(wide.columns):
        return pd.DataFrame(columns=["heads", "of_heads", "layers", "of_layers", "reduction"])
    wide = wide.dropna(subset=list(PAPER))
    heads = (wide.blockgtq < wide.tq_mse).groupby("bits").agg(["sum", "size"])
    by_layer = wide.groupby(["bits", "layer"]).mean()
    layers = (by_layer.blockgtq < by_layer.tq_mse).groupby("bits").agg(["sum", "size"])
    mean = wide.groupby("bits").mean()
    return pd.DataFrame({"heads": heads["sum"], "of_heads": heads["size"], "layers": layers["sum"], "of_layers": layers["size"],
                         "reduction": 1 - mean.blockgtq / mean.tq_mse})  # fmt: skip


def draw(rows: pd.DataFrame):
    figure, (left, right) = plt.subplots(1, 2, figsize=(style.PAGE, 2.9))
    for (quant, bits), part in rows.groupby(["quant", "bits"]):
        by_layer = part.groupby("layer").logit_mae.mean()
        line = ("-", "--", ":")[sorted(rows.bits.unique()).index(bits) % 3]
        left.plot(by_layer.index, by_layer, color=style.color(quant), marker=style.marker(quant), linestyle=line, label=f"{style.label(quant)}, {bits:g} bits")
    left.set_xlabel("layer")
    left.set_ylabel("logit MAE (before softmax)")
    left.set_ylim(bottom=0)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    for quant, part in rows.groupby("quant"):
        cells = part.groupby("bits").agg(x=("bits_stored", "mean"), y=("logit_mae", "mean"))
        right.plot(cells.x, cells.y, color=style.color(quant), marker=style.marker(quant), linestyle="--" if quant == "tq_mse" else "none", label=style.label(quant))
    right.set_xlabel("stored bits per key value (codes and norms)")
    right.set_ylabel("logit MAE")
    right.set_yscale("log")
    right.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    right.yaxis.set_minor_formatter(lambda v, _: f"{v:g}")
    return figure


def table(rows: pd.DataFrame) -> str:
    """Markdown: wins at equal code bits, and the error TQ-MSE would have at Block-GTQ's stored bytes (log-linear between its budgets)."""
    import numpy as np

    lines = ["| code bits | layers won | heads won | reduction | TQ-MSE stored | Block-GTQ stored | MAE TQ-MSE | MAE Block-GTQ | MAE TQ-MSE at equal bytes |",
             "|---" * 9 + "|"]  # fmt: skip
    mean = rows.groupby(["quant", "bits"]).agg(x=("bits_stored", "mean"), y=("logit_mae", "mean"))
    tq = mean.loc["tq_mse"]
    for bits, won in wins(rows).iterrows():
        ours, theirs = mean.loc[("blockgtq", bits)], tq.loc[bits]
        equal = float(np.exp(np.interp(ours.x, tq.x, np.log(tq.y)))) if tq.x.min() <= ours.x <= tq.x.max() else float("nan")
        beside = f"{equal:.3f}" if equal == equal else "outside the budgets run"
        lines.append(f"| {bits:g} | {won.layers:.0f}/{won.of_layers:.0f} | {won.heads:.0f}/{won.of_heads:.0f} | {won.reduction:.1%} | {theirs.x:.3f} | {ours.x:.3f} "
                     f"| {theirs.y:.3f} | {ours.y:.3f} | {beside} |")  # fmt: skip
    for (quant, bits), cell in mean.iterrows():
        if quant not in PAPER:
            lines.append(f"| {bits:g}, {style.label(quant)} | | | {1 - cell.y / tq.y[bits]:.1%} | {tq.x[bits]:.3f} | {cell.x:.3f} | {tq.y[bits]:.3f} | {cell.y:.3f} | |")
    return "\n".join(["Keys only, stand-in model, calibrated on training text, scored on one held-out sample of 2,048 tokens, one seed; equal bytes by log-linear interpolation. Generated by `make figures`.", "", *lines, ""])
