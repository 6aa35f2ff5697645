"""Scores of methods against their stored bits: the panel that most experiments draw, and the table beside it."""

from pathlib import Path

import matplotlib.pyplot as plt
import matplotlib.ticker
import pandas as pd

from experiments import choice, committed, reported, style
from experiments.tables import SEEDS, Table, spread

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


def panel(axis, part: pd.DataFrame, x: str = "bits_stored", names: bool = True, loss: bool = False, every: pd.DataFrame | None = None) -> None:
    """One line per method: mean over seeds, error bars of one standard deviation over seeds or, with one seed, one standard error.

    A line breaks at a budget that `every`, the rows of all panels, holds for the method and this panel lacks.
    """
    ends = []
    for quant, group in part.groupby("quant"):
        cells = group.groupby(["key_bits", "value_bits"]).agg(x=(x, "mean"), y=("value", "mean"), spread=("value", "std"), n=("value", "size"), stderr=("stderr", "mean"))
        if every is not None:
            cells = _with_gaps(cells, every[every["quant"] == quant])
        cells = cells.sort_values("x")
        style.points(axis, cells.x, cells.y, cells.spread.where(cells.n > 1, cells.stderr), quant)
        ends.append((float(cells.y.dropna().iloc[-1]), style.label(quant), style.color(quant)))
    if loss:
        axis.set_yscale("symlog", linthresh=1e-2)
        axis.set_ylim(bottom=min(0, part["value"].min()))  # linear below .01: the tick at 0 says so
        axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    else:
        axis.axhline(part["fp16"].mean(), color=style.color("fp16"), linestyle="--", linewidth=0.8)
        ends.append((float(part["fp16"].mean()), "fp16", style.color("fp16")))
        top = axis.get_ylim()[1]
        axis.set_ylim(bottom=-0.04 * top if part["value"].min() < 0.04 * top else 0)  # a marker at 0 is seen whole
    style.plain_log(axis)
    axis.minorticks_off()
    low, high = axis.get_xlim()
    if high < 5 * low:
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))  # powers of two would be one or two ticks
    if names:
        style.name_ends(axis, ends)


def _with_gaps(cells: pd.DataFrame, every: pd.DataFrame) -> pd.DataFrame:
    """Cells by (key_bits, value_bits) with a line of NaN, between its neighbours, for each missing budget of equal key and value bits."""
    equal = every[every["key_bits"] == every["value_bits"]].set_index(["key_bits", "value_bits"]).index
    whole = cells.reindex(cells.index.union(equal.unique()))
    return whole.assign(x=whole["x"].interpolate()).dropna(subset="x")


def absent(rows: pd.DataFrame, titles: dict[str, str], column: str = "task") -> str:
    """Which budgets of a method one task lacks and another has, as a sentence; empty if none. titles: value of `column` to the words for it."""
    asked = rows[rows[column].isin(titles)]
    asked = asked.assign(budget=[f"{r.key_bits:g}" if r.key_bits == r.value_bits else f"{r.key_bits:g}/{r.value_bits:g}" for r in asked.itertuples()])
    told = []
    for name, title in titles.items():
        ran = set(map(tuple, asked.loc[asked[column] == name, ["quant", "budget"]].to_numpy()))
        if not ran:
            continue
        lacks = asked[[cell not in ran for cell in zip(asked["quant"], asked["budget"])]].sort_values(["key_bits", "value_bits"])
        methods = (f"{style.label(quant)} at {', '.join(part['budget'].unique())}" for quant, part in lacks.groupby("quant"))
        told += [f"{title}: {'; '.join(methods)}"] if len(lacks) else []
    return f" Not run at these bits: {'. '.join(told)}." if told else ""


def figure(rows: pd.DataFrame, panels: list[tuple[str, str]]):
    """Panels side by side: (task, y label); tasks without rows are left out."""
    panels = [p for p in panels if (rows["task"] == p[0]).any()]
    drawing, axes = plt.subplots(1, len(panels), figsize=(style.COLUMN * (1 if len(panels) == 1 else 2), 2.6), squeeze=False)
    for axis, (task, title) in zip(axes[0], panels):
        panel(axis, rows[rows["task"] == task], loss="loss" in title, every=rows)
        axis.set_xlabel("stored bits per value")
        axis.set_ylabel(title)
    return drawing


def overlay(axis, published: pd.DataFrame, model: str) -> None:
    """Crosses at a paper's values (columns budget, method, value), only where they were measured on this model."""
    for row in reported.on(model, published).itertuples():
        axis.plot(float(row.budget), row.value, marker="x", color=style.color(reported.METHODS.get(row.method, row.method)), linestyle="none", zorder=5)


def tabulate(rows: pd.DataFrame, caption: str, columns: list[tuple[str, str]], digits: int = 3) -> Table:
    """One line per method and budget: mean ± spread (seeds) per task and, since they depend on its length, the all-in bits of each task; fp16 first."""
    total = {task: "all-in" if len(columns) == 1 else f"all-in, {title}" for task, title in columns}
    first = {"method": "fp16", "bits K/V": "16/16", "stored": "16.000", **dict.fromkeys(total.values(), "16.00")}
    plain = {title: rows[rows["task"] == task]["fp16"].mean() for task, title in columns}
    lines = [{**first, **{title: "" if mean != mean else f"{mean:.{digits}f}" for title, mean in plain.items()}}]
    for (quant, key, value), group in rows.groupby(["quant", "key_bits", "value_bits"]):
        line = {"method": style.label(quant), "bits K/V": f"{key:g}/{value:g}", "stored": f"{group['bits_stored'].mean():.3f}"}
        parts = {task: group[group["task"] == task] for task, _ in columns}
        line |= {total[task]: f"{part['bits_total'].mean():.2f}" if len(part) else "" for task, part in parts.items()}
        line |= {title: spread(parts[task]["value"], parts[task]["stderr"], digits, seeds=True) for task, title in columns}
        lines.append(line)
    return Table(f"{caption} {SEEDS[0].upper()}{SEEDS[1:]}." + absent(rows, dict(columns))).add("", pd.DataFrame(lines))


def published(paper: str, *names: str, index: list[str], columns: str) -> pd.DataFrame:
    """A paper's table as it is printed: `index` columns down, `columns` across."""
    frame = reported.table(paper, *names)
    frame = frame[frame["value"].notna()]
    frame = frame.assign(method_budget=[f"{r.method} {r.budget}".replace(" fp16", "").strip() for r in frame.itertuples()])
    wide = frame.pivot_table(index=index, columns=columns, values="value", sort=False, aggfunc="first").reset_index()
    wide.columns.name = None
    return wide
