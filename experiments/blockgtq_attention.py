"""Block-GTQ Figure 4, Tables 12 and 13: what coded keys do to the softmax, against stored bits."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import heads, reported, style
from experiments.tables import Table

METHODS = ("tq_mse", "blockgtq", "blockgtq_plus", "kivi_scale_only")
METRICS = {"kl": "KL to exact attention (nats)", "top10": "overlap of the ten largest\nlogits (percent)"}


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    found = heads.gather(results, model, "attention", METHODS)
    return found.assign(top10=100 * found["top10"]) if len(found) else found


def draw(rows: pd.DataFrame):
    figure, axes = plt.subplots(1, 2, figsize=(style.PAGE, 2.6))
    for axis, (metric, title) in zip(axes, METRICS.items()):
        cells, ends = heads.means(rows, metric), []
        for quant in METHODS:
            if quant in cells.index.get_level_values(0):
                mine = cells.loc[quant]
                style.points(axis, mine.x, mine.y, mine.spread, quant)
                ends.append((float(mine.y.iloc[-1]), style.label(quant), style.color(quant)))
        if metric == "kl":
            style.plain_log(axis, "y", 10)
        axis.set_xlabel("stored bits per key value (codes and norms)")
        axis.set_ylabel(title)
        style.name_ends(axis, ends)
    return figure


def table(rows: pd.DataFrame) -> Table:
    kl, top = heads.means(rows, "kl"), heads.means(rows, "top10")
    lines = [{"method": style.label(q), "code bits": b, "stored": round(kl.x[q, b], 3), "KL": f"{kl.y[q, b]:.4f} ± {kl.spread[q, b]:.4f}",
              "top-10": f"{top.y[q, b]:.1f} ± {top.spread[q, b]:.1f}", "seeds": int(kl.seeds[q, b])} for q, b in kl.index]  # fmt: skip
    won = [heads.wins(rows, m, larger=m == "top10").reset_index().assign(metric=m) for m in METRICS]
    won = pd.concat(won)[["metric", "key_bits", "layers", "of_layers", "heads", "of_heads", "reduction"]].round(3)
    made = Table("Keys only, 1,024 query positions with full causal prefixes; mean of layers and heads, ± standard deviation over seeds.")
    made.add("", pd.DataFrame(lines)).add("Block-GTQ better than TQ-MSE", won)
    for name, title in (("T12", "softmax KL, Table 12"), ("T13", "top-10 overlap, Table 13")):
        paper = reported.table("blockgtq", name).pivot_table(index="model", columns=["method", "budget"], values="value", sort=False).reset_index()
        paper.columns = [" ".join(c).replace("-only", "").strip() for c in paper.columns]
        made.add(f"Reported ({title})", paper)
    return made


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean KL and overlap per method and budget in long form: columns quant, key_bits, x (stored bits), y, metric."""
    return pd.concat([heads.means(rows, metric).reset_index().assign(metric=metric) for metric in METRICS])
