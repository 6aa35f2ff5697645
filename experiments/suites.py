"""Every suite under one method of each kind at 4 to 1 bits, and whether its scores order the budgets as the losses do."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import choice, committed, scores, style
from experiments.tables import SEEDS, Table, spread

QUANTS = ("gsrq", "blockgtq", "kivi")
BITS = (4, 3, 2, 1)
TASKS = {
    "perplexity": ("loss_minus_fp16", "loss above fp16"),
    "longbench": ("score", "LongBench"),
    "niah": ("score", "needles found"),
    "aime": ("score", "written arithmetic"),
    "choices": ("score", "multiple choice"),
}
"""Task: metric and title; scores in percent."""
CHECKED = (4, 2, 1)
"""Budgets whose order is judged."""
SAID = ("limit", "context", "lengths", "depths", "repeats", "shots", "lines", "data", "max_new_tokens")
"""Options of a task that say how much of it was run."""


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """One row per task, method, budget and seed, all of one calibration and one size of each task; `protocol` says which."""
    frame = committed.load(results, model=model, task=list(TASKS), quant=[*QUANTS, "fp16"])
    frame = committed.shipped(frame[frame["bits"].isin(BITS) | (frame["quant"] == "fp16")])
    frame = committed.one_setting(committed.one_calibration(frame))
    parts = []
    for task, (metric, _) in TASKS.items():
        part = frame[frame["task"] == task]
        mine = choice.averages(part[part["quant"] != "fp16"], metric)
        name = metric.removesuffix("_minus_fp16")
        fp16 = choice.averages(part[part["quant"] != "fp16"], f"{name}_fp16").set_index("run")["value"]
        parts.append(mine.assign(fp16=mine["run"].map(fp16)))
    found = pd.concat(parts)
    if found.empty:
        return found
    found = found.assign(
        protocol=[_protocol(row.task, row.options) for row in found.itertuples()],
        calibration=committed.calibration(found),
        dtype=committed.option(found, "identity.model.dtype"),
    )
    keep = ["task", "model", "quant", "bits", "bits_stored", "bits_total", "seed", "value", "stderr", "n", "fp16", "protocol", "calibration", "dtype"]
    return found[keep].sort_values(["task", "quant", "bits", "seed"], ignore_index=True)


def _protocol(task: str, options: dict) -> str:
    said = {k: v for k, v in options["task"].items() if k in SAID and v is not None}
    return f"{task}: prefill {options['prefill']}, " + ", ".join(f"{k} {json.dumps(v).strip(chr(34))}" for k, v in said.items())


def order(rows: pd.DataFrame) -> pd.DataFrame:
    """Per method and suite: does the score fall at every step of 4, 2, 1 bits, as the loss rises? `within error`: a step the wrong way by less than its standard error."""
    means = rows.groupby(["task", "quant", "bits"]).agg(value=("value", "mean"), stderr=("stderr", "mean"))
    lines = []
    for quant in QUANTS:
        loss = [means["value"].get(("perplexity", quant, bits)) for bits in CHECKED]
        for task in TASKS:
            cells = [means.loc[(task, quant, bits)] if (task, quant, bits) in means.index else None for bits in CHECKED]
            if task == "perplexity" or any(c is None for c in cells) or None in loss:
                continue
            lines.append({"quant": quant, "task": task, "follows": _follows(loss, cells), "held": sum(a["value"] > b["value"] for a, b in zip(cells, cells[1:]))})
    return pd.DataFrame(lines, columns=["quant", "task", "follows", "held"])


def _follows(loss: list[float], cells: list[pd.Series]) -> str:
    if sorted(loss) != loss:
        return "the loss itself does not rise"
    steps = list(zip(cells, cells[1:]))
    if all(finer["value"] > coarser["value"] for finer, coarser in steps):
        return "yes"
    errors = [(finer["stderr"] ** 2 + coarser["stderr"] ** 2) ** 0.5 for finer, coarser in steps]
    return "within error" if all(finer["value"] >= coarser["value"] - error for (finer, coarser), error in zip(steps, errors)) else "no"


def draw(rows: pd.DataFrame):
    panels = [(task, title) for task, (_, title) in TASKS.items() if (rows["task"] == task).any()]
    every = rows.assign(key_bits=rows["bits"], value_bits=rows["bits"])
    figure, axes = plt.subplots(1, len(panels), figsize=(style.PAGE if len(panels) > 1 else style.COLUMN, 2.4), squeeze=False)
    for axis, (task, title) in zip(axes[0], panels):
        scores.panel(axis, every[every["task"] == task], names=False, loss=task == "perplexity", every=every)
        axis.set_title(title)
        axis.set_xlabel("stored bits")
        axis.set_ylabel("nats per token" if task == "perplexity" else "percent" if axis is axes[0][min(1, len(panels) - 1)] else "")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def table(rows: pd.DataFrame) -> Table:
    tasks = [t for t in TASKS if (rows["task"] == t).any()]
    verdicts = order(rows).set_index(["quant", "task"])["follows"]
    first = {"method": "fp16", "bits": "16", "stored": "16.000", "all-in": "16.00"}
    lines = [{**first, **{TASKS[t][1]: _reference(rows, t) for t in tasks}}]
    for quant in QUANTS:
        for bits in sorted(rows[rows["quant"] == quant]["bits"].unique(), reverse=True):
            group = rows[(rows["quant"] == quant) & (rows["bits"] == bits)]
            total = group[group["task"] == "perplexity"]["bits_total"]
            line = {"method": style.label(quant), "bits": f"{bits:g}", "stored": f"{group['bits_stored'].mean():.3f}", "all-in": f"{total.mean():.2f}" if len(total) else ""}
            for task in tasks:
                part = group[group["task"] == task]
                line[TASKS[task][1]] = spread(part["value"], part["stderr"], 3 if task == "perplexity" else 1, seeds=True)
            lines.append(line)
        if quant in verdicts:
            steps = " > ".join(map(str, CHECKED))
            lines.append({"method": f"{style.label(quant)}: scores order {steps} as the loss does?", **{TASKS[t][1]: verdicts[quant].get(t, "") for t in tasks}})
    asked = "; ".join(f"{TASKS[t][1]} n = {int(rows[rows['task'] == t]['n'].max())}" for t in tasks)
    protocol = "; ".join(dict.fromkeys(rows["protocol"]))
    caption = (
        f"Loss in nats per token above fp16 (fp16 row: the loss), scores in percent; {SEEDS}. "
        f"Examples: {asked}. Calibration: {', '.join(dict.fromkeys(rows['calibration']))}. Protocol: {protocol}. "
        "All-in bits are of the perplexity run. `within error`: a step the wrong way by less than its standard error; an equal score is one."
        + scores.absent(rows.assign(key_bits=rows["bits"], value_bits=rows["bits"]), {t: TASKS[t][1] for t in tasks})
        + _number_types(rows)
    )
    return Table(caption).add("", pd.DataFrame(lines).fillna(""))


def _number_types(rows: pd.DataFrame) -> str:
    """The number type of most runs, and which lines have another, with its budgets if a line mixes types, in a sentence."""
    most = rows["dtype"].mode()[0]
    others = []
    for (quant, task), part in rows.groupby(["quant", "task"]):
        for dtype, mine in part[part["dtype"] != most].groupby("dtype"):
            some = f" at {', '.join(f'{bits:g}' for bits in sorted(mine['bits'].unique()))} bits" if len(mine) < len(part) else ""
            others.append(f"{dtype} for {style.label(quant)}, {TASKS[task][1]}{some}")
    told = "; ".join(others)
    return f" Runs are in {most}" + (f" ({told})." if told else ".")


def _reference(rows: pd.DataFrame, task: str) -> str:
    part = rows[rows["task"] == task]
    value = part[part["dtype"] == part["dtype"].mode()[0]]["fp16"].mean()
    return f"(loss {value:.3f})" if task == "perplexity" else f"{value:.1f}"
