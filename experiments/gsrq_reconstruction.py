"""GSRQ Figure 5: k-means and GSKM on the model's keys and values by piece size, from both starts, original and first residual.

The paper gives each method its own start. Here update and start are crossed, and every arm is shown as its difference to k-means++ in the
same layers, so that the start's part and the update's part can be read off.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import committed, reported, stages, style
from experiments.tables import Table

METRICS = {"captured": "captured energy", "gain_error": "gain error\n(norm units)", "cosine": "cosine"}
ARMS = {
    "km spherical": ("#56B4E9", "D", "k-means, spherical start"),
    "gskm kmeans++": ("#882255", "P", "GSKM, k-means++ start"),
    "gskm spherical": ("#0072B2", "o", "GSKM, spherical start"),
}
BASE = "km kmeans++"


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """Means over layers, and `difference` to k-means++ with its standard error over layers, paired."""
    found = stages.shaped(stages.gather(results, model, ("km", "gskm"), (*METRICS, "mse", "entropy")))
    if found.empty:
        return found
    found = found[found["stage"].isin((1, 2)) & (found["seed"] == found["seed"].min())].assign(arm=found["quant"] + " " + found["start"])
    frame = committed.load(results, model=model, task="reconstruction")
    records = committed.records(results, frame[frame["run"].isin(found["run"])])
    values = records.melt(["run", "id"], [c for c in records if "/" in c], var_name="name").dropna()
    values = values.set_index(["run", "id", "name"])["value"]
    base = {(r.piece, r.entries): r.run for r in found[found["arm"] == BASE].itertuples()}
    lines = []
    for row in found.itertuples():
        mine, theirs = (values.get(run) for run in (row.run, base.get((row.piece, row.entries))))
        if theirs is None:
            lines.append((float("nan"), float("nan")))
            continue
        both = (mine - theirs).xs(f"{row.metric}/{row.stage}", level="name")
        both = both[both.index.str.endswith(f"/{row.kind} {row.split}")]
        lines.append((both.mean(), both.sem()))
    return found.assign(difference=[m for m, _ in lines], difference_stderr=[s for _, s in lines])


def draw(rows: pd.DataFrame):
    """K = 256, held out: metrics down; keys and values, original and residual across."""
    columns = [(kind, stage) for kind in ("key", "value") for stage in (1, 2)]
    part = rows[(rows["entries"] == 256) & (rows["split"] == "heldout")]
    figure, axes = plt.subplots(3, 4, figsize=(style.PAGE, 4.6), sharex=True, sharey="row")
    for line, (metric, title) in zip(axes, METRICS.items()):
        for axis, (kind, stage) in zip(line, columns):
            for arm, (colour, mark, text) in ARMS.items():
                cells = part[(part["metric"] == metric) & (part["kind"] == kind) & (part["stage"] == stage) & (part["arm"] == arm)].sort_values("piece")
                axis.errorbar(cells["piece"], cells["difference"], cells["difference_stderr"], color=colour, marker=mark, markersize=3.5, capsize=2, elinewidth=0.8, label=text)
            axis.axhline(0, color="0.4", linewidth=0.8)
            style.plain_log(axis)
            axis.set_xticks(sorted(part["piece"].unique()), [str(p) for p in sorted(part["piece"].unique())])
            if metric == "captured":
                axis.set_title(f"{kind}s, {'original' if stage == 1 else 'first residual'}")
            if metric == "cosine":
                axis.set_xlabel("piece size D")
        line[0].set_ylabel(f"{title}\nminus k-means++'s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def table(rows: pd.DataFrame) -> Table:
    cells = rows[rows["entries"] == 256].assign(signal=rows["stage"].map({1: "original", 2: "first residual"}))
    wide = cells.pivot_table(index=["kind", "signal", "piece", "quant", "start", "split"], columns="metric", values="value").round(4).reset_index()
    control = reported.table("gsrq", "Fig5-extra", metric="mse_per_element", model="Llama-3-8B")
    control = control[control["method"].isin(["KM", "KM-spherical-start", "GSKM"])]
    control = control.pivot_table(index=["tensor", "signal", "D", "K"], columns="method", values="value", sort=False).reset_index()
    made = Table("Reconstruction per stage, K = 256, mean of layers; mse is relative to the energy of the original.").add("Here", wide)
    return made.add("The authors' own unpublished control: k-means from a spherical start, mean squared error per element (Llama-3-8B, training vectors)", control)
