"""Scores of methods against their stored bits: the panel that most experiments draw, and the table beside it."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import choice, committed, reported, style
from experiments.tables import Table, spread

KEEP = ["task", "model", "quant", "bits", "key_bits", "value_bits", "bits_stored", "bits_total", "seed", "value", "stderr", "n", "fp16", "subset"]
LOSS = "held-out loss above fp16\n(nats per token)"


def gather(results: Path, model: str, tasks: dict[str, str], quants: tuple[str, ...] = (), allowed: tuple[str, ...] = (), subsets: bool = False) -> pd.DataFrame:
    """One row per run and task (and subset, if asked): value of the task's metric, the fp16 value of the same examples, and bits.

    tasks: task name to metric. quants: restrict to these; fp16 rows are left out, their value is in column fp16.
    """
    frame = committed.load(results, model=model, task=list(tasks))
    if quants:
        frame = frame[frame["quant"].isin([*quants, "fp16"])]
    frame = committed.one_setting(committed.shipped(frame, allowed))
    parts = []
    for task, metric in tasks.items():
        part = frame[(frame["task"] == task) & ~frame["quant"].isin(["fp16", "zero"])]
        name = metric.removesuffix("_minus_fp16")
        mine, fp16 = (part[part["metric"] == m] if subsets else choice.averages(part, m) for m in (metric, f"{name}_fp16"))
        if mine.empty:
            continue
        reference = fp16.set_index(["run", "subset"])["value"]
        mine = mine.assign(fp16=[reference.get((r.run, r.subset), float("nan")) for r in mine.itertuples()])
        parts.append(mine.assign(key_bits=committed.option(mine, "quant.key.bits"), value_bits=committed.option(mine, "quant.value.bits")))
    rows = pd.concat(parts) if parts else pd.DataFrame(columns=KEEP)
    return rows[KEEP].sort_values(["task", "quant", "bits", "seed", "subset"], ignore_index=True)


def panel(axis, part: pd.DataFrame, x: str = "bits_stored", names: bool = True, loss: bool = False) -> None:
    """One line per method: mean over seeds, error bars of one standard deviation over seeds or, with one seed, one standard error."""
    ends = []
    for quant, group in part.groupby("quant"):
        cells = (
            group.groupby(["key_bits", "value_bits"])
            .agg(x=(x, "mean"), y=("value", "mean"), spread=("value", "std"), n=("value", "size"), stderr=("stderr", "mean"))
            .sort_values("x")
        )
        style.points(axis, cells.x, cells.y, cells.spread.where(cells.n > 1, cells.stderr), quant)
        ends.append((float(cells.y.iloc[-1]), style.label(quant), style.color(quant)))
    if loss:
        axis.set_yscale("symlog", linthresh=1e-2)
        axis.set_ylim(bottom=min(0, part["value"].min()))  # linear below .01: the tick at 0 says so
        axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    else:
        axis.axhline(part["fp16"].mean(), color=style.color("fp16"), linestyle="--", linewidth=0.8)
        ends.append((float(part["fp16"].mean()), "fp16", style.color("fp16")))
        axis.set_ylim(bottom=0)
    style.plain_log(axis)
    axis.minorticks_off()
    if names:
        style.name_ends(axis, ends)


def figure(rows: pd.DataFrame, panels: list[tuple[str, str]]):
    """Panels side by side: (task, y label); tasks without rows are left out."""
    panels = [p for p in panels if (rows["task"] == p[0]).any()]
    drawing, axes = plt.subplots(1, len(panels), figsize=(style.COLUMN * (1 if len(panels) == 1 else 2), 2.6), squeeze=False)
    for axis, (task, title) in zip(axes[0], panels):
        panel(axis, rows[rows["task"] == task], loss="loss" in title)
        axis.set_xlabel("stored bits per value")
        axis.set_ylabel(title)
    return drawing


def overlay(axis, published: pd.DataFrame, model: str) -> None:
    """Crosses at a paper's values (columns budget, method, value), only where they were measured on this model."""
    for row in reported.on(model, published).itertuples():
        axis.plot(float(row.budget), row.value, marker="x", color=style.color(reported.METHODS.get(row.method, row.method)), linestyle="none", zorder=5)


def tabulate(rows: pd.DataFrame, caption: str, columns: list[tuple[str, str]], digits: int = 3) -> Table:
    """One line per method and budget: mean ± spread per task; fp16 first."""
    lines = []
    first = {"method": "fp16", "bits K/V": "16/16", "stored": "16.000", "all-in": "16.00"}
    lines.append({**first, **{title: f"{rows[rows['task'] == task]['fp16'].mean():.{digits}f}" for task, title in columns}, "seeds": ""})
    for (quant, key, value), group in rows.groupby(["quant", "key_bits", "value_bits"]):
        line = {"method": style.label(quant), "bits K/V": f"{key:g}/{value:g}", "stored": f"{group['bits_stored'].mean():.3f}", "all-in": f"{group['bits_total'].mean():.2f}"}
        for task, title in columns:
            part = group[group["task"] == task]
            line[title] = spread(part["value"], part["stderr"], digits)
        lines.append({**line, "seeds": group["seed"].nunique()})
    return Table(caption).add("", pd.DataFrame(lines))


def published(paper: str, *names: str, index: list[str], columns: str) -> pd.DataFrame:
    """A paper's table as it is printed: `index` columns down, `columns` across."""
    frame = reported.table(paper, *names)
    frame = frame[frame["value"].notna()]
    frame = frame.assign(method_budget=[f"{r.method} {r.budget}".replace(" fp16", "").strip() for r in frame.itertuples()])
    wide = frame.pivot_table(index=index, columns=columns, values="value", sort=False, aggfunc="first").reset_index()
    wide.columns.name = None
    return wide
