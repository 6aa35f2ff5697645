"""The GSRQ family at every budget: k-means from three starts, GSKM and GSRQ, in loss and in needles found, over seeds.

`python run.py experiment=budget` and `experiment=starts` make the rows.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import choice, committed, scores, start_effect, style
from experiments.tables import Table, spread

TASKS = {"perplexity": ("loss_minus_fp16", scores.LOSS), "niah": ("score", "needles found\n(percent)")}
STARTS = ("key.cluster.start", "value.cluster.start")
GSRQ = "gsrq spherical"
ARMS = {arm: start_effect.ARMS[arm][3:] for arm in ("km random", "km kmeans++", "km spherical", "gskm spherical")} | {GSRQ: ("#000000", "X", "GSRQ, spherical start")}
"""Method and start: colour, marker and label, those of `start_effect`."""


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """One row per task, arm, budget and seed."""
    frame = committed.load(results, model=model, task=list(TASKS), quant=["km", "gskm", "gsrq"])
    frame = committed.one_setting(committed.one_calibration(committed.shipped(frame, STARTS)))
    parts = [choice.averages(frame[frame["task"] == task], metric) for task, (metric, _) in TASKS.items()]
    found = pd.concat(parts)
    if found.empty:
        return found
    found = found.assign(arm=found["quant"] + " " + committed.option(found, "quant.key.cluster.start"), calibration=committed.calibration(found))
    keep = ["task", "model", "arm", "bits", "seed", "value", "stderr", "n", "calibration"]
    return found[found["arm"].isin(ARMS)][keep].sort_values(["task", "arm", "bits", "seed"], ignore_index=True)


def draw(rows: pd.DataFrame):
    """Loss and needles against bits; mean and standard deviation over seeds (one seed: its standard error), arms set apart sideways."""
    panels = [(task, title) for task, (_, title) in TASKS.items() if (rows["task"] == task).any()]
    figure, axes = plt.subplots(1, len(panels), figsize=(style.PAGE if len(panels) > 1 else style.COLUMN, 2.8), squeeze=False)
    for axis, (task, title) in zip(axes[0], panels):
        for place, (arm, (colour, mark, text)) in enumerate(ARMS.items()):
            part = rows[(rows["task"] == task) & (rows["arm"] == arm)]
            if part.empty:
                continue
            cells = part.groupby("bits").agg(y=("value", "mean"), over=("value", "std"), own=("stderr", "mean"))
            error = cells["over"].fillna(cells["own"])
            axis.errorbar(cells.index * 1.03 ** (place - 2), cells["y"], error, color=colour, marker=mark, markersize=3.5, linewidth=0.9, capsize=1.5, elinewidth=0.7, label=text)
        style.plain_log(axis)
        ticks = sorted(rows["bits"].unique())
        axis.set_xticks(ticks, [f"{b:g}" for b in ticks])
        if task == "perplexity":
            style.plain_log(axis, "y", 10)
        axis.set_xlabel("stored bits per value")
        axis.set_ylabel(title)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def rises(rows: pd.DataFrame, budgets: tuple[float, ...] = (4, 2, 1, 0.5)) -> pd.DataFrame:
    """Per arm: does the mean loss rise at every step down the budgets that were run? Columns arm, budgets, rises."""
    mean = rows[rows["task"] == "perplexity"].groupby(["arm", "bits"])["value"].mean()
    lines = []
    for arm in ARMS:
        found = [b for b in budgets if (arm, b) in mean.index]
        values = [mean[arm, b] for b in found]
        if len(found) > 1:
            lines.append({"arm": arm, "budgets": " > ".join(f"{b:g}" for b in found), "rises": all(a < b for a, b in zip(values, values[1:]))})
    return pd.DataFrame(lines, columns=["arm", "budgets", "rises"])


def _full(part: pd.DataFrame) -> str:
    """How many cells of every arm and budget have three seeds."""
    seeds = part.groupby(["arm", "bits"])["seed"].nunique()
    return f"{(seeds >= 3).sum()} cells of {len(seeds)} have three seeds"


def table(rows: pd.DataFrame) -> Table:
    made = Table(
        "Mean ± standard deviation over seeds, their number in brackets; with one seed, its standard error. An empty cell has not been run. "
        f"Calibration: {', '.join(rows['calibration'].unique())}. n = "
        + ", ".join(f"{part['n'].max():.0f} ({task})" for task, part in rows.groupby("task"))
        + ". "
        + "; ".join(f"{task}: {_full(part)}" for task, part in rows.groupby("task", sort=False))
        + "."
    )
    for task, title in (("perplexity", "Loss above fp16, nats per token"), ("niah", "Needles found, percent")):
        part = rows[rows["task"] == task]
        if part.empty:
            continue
        digits = 4 if task == "perplexity" else 1
        wide = part.groupby(["arm", "bits"]).apply(lambda g, d=digits: f"{spread(g['value'], g['stderr'], d)} ({g['seed'].nunique()})", include_groups=False).unstack("bits")
        wide = wide.reindex([a for a in ARMS if a in wide.index]).fillna("")
        wide.columns = [style.bits(b) for b in wide.columns]
        made.add(title, wide.rename(index=lambda a: ARMS[a][2]).rename_axis("method").reset_index())
    steps = rises(rows).assign(arm=lambda t: t["arm"].map(lambda a: ARMS[a][2]), rises=lambda t: t["rises"].map({True: "yes", False: "no"}))
    return made.add("Does the loss rise as bits fall?", steps.rename(columns={"arm": "method", "rises": "rises at every step"}))
