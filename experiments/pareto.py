"""Which quantizer at which budget: loss, KL, top-1 agreement, LongBench and needles of every method, against stored bits and against all-in bits.

Stored bits are what a token costs in a running cache; all-in bits add codebooks and exact tokens for one sequence of the run's
length, where vector quantizers pay for their tables.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import committed, scores, style
from experiments.tables import SEEDS, Table, spread

PANELS = (
    ("loss", "loss_minus_fp16", scores.LOSS),
    ("kl", "kl", "KL to fp16\n(nats per token)"),
    ("longbench", "score", "LongBench\n(percent)"),
    ("niah", "score", "needles found\n(percent)"),
)
TABLED = (("top1", "top1", ""),)
"""Measures of the table alone."""
TASKS = {"loss": "perplexity", "kl": "perplexity", "top1": "perplexity", "longbench": "longbench", "niah": "niah"}
AXES = (("bits_stored", "stored bits per value"), ("bits_total", "all-in bits per value, one sequence"))
FEWEST = 3
"""Methods a panel needs."""


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    parts = [scores.gather(results, model, {TASKS[name]: metric}).assign(panel=name) for name, metric, _ in PANELS + TABLED]
    parts.append(streamed(results, model))
    return pd.concat([p for p in parts if len(p)], ignore_index=True) if any(map(len, parts)) else parts[0]


def streamed(results: Path, model: str) -> pd.DataFrame:
    """Loss token by token, panel `streamed`, and of the same windows in one pass, panel `one pass`: one row each per run that has both."""
    loss = committed.shipped(committed.load(results, model=model, task="perplexity", metric="loss_minus_fp16"))
    loss = loss[loss["quant"] != "fp16"]
    options = zip(loss["options"], loss["calib"])
    told = [json.dumps([{**o["task"], "streamed": None, "batch_size": None}, calib != "none" and o["calib"]], sort_keys=True) for o, calib in options]
    bits = {f"{kind}_bits": committed.option(loss, f"quant.{kind}.bits") for kind in ("key", "value")}
    loss = loss.assign(same=told, step=committed.option(loss, "task.streamed"), **bits)
    pairs = loss.groupby(["quant", "key_bits", "value_bits", "seed", "same"])["step"].transform("nunique") == 2
    return loss[pairs].assign(panel=loss["step"].map({True: "streamed", False: "one pass"}))[[*(c for c in scores.KEEP if c != "fp16"), "panel"]]


def draw(rows: pd.DataFrame):
    """One row of panels per measure: left against stored bits, right against all-in bits; one legend, sorted by kind of method."""
    shown = [p for p in PANELS if rows[rows["panel"] == p[0]]["quant"].nunique() >= FEWEST]
    figure, axes = plt.subplots(len(shown), 2, figsize=(style.PAGE, 0.7 + 1.75 * len(shown)), squeeze=False, sharex="col", sharey="row")
    for place, (line, (name, _, title)) in enumerate(zip(axes, shown)):
        part = rows[rows["panel"] == name]
        for axis, (column, text) in zip(line, AXES):
            scores.panel(axis, part, column, names=False, loss=name in ("loss", "kl"), every=rows)
            if place == len(shown) - 1:
                axis.set_xlabel(text)
        line[0].set_ylabel(title)
    named = {}
    for axis in axes[:, 0]:
        named |= {text: handle for handle, text in zip(*axis.get_legend_handles_labels())}
    order = [style.label(q) for q in style.COLORS if style.label(q) in named] + sorted(set(named) - {style.label(q) for q in style.COLORS})
    figure.legend([named[t] for t in order], order, loc="outside upper center", ncols=5)
    return figure


def table(rows: pd.DataFrame) -> Table:
    columns = {"loss": ("loss above fp16", 3), "kl": ("KL to fp16", 3), "top1": ("top-1 agreement", 3), "longbench": ("LongBench", 1), "niah": ("needles", 1)}
    fp16 = {name: rows[rows["panel"] == name]["fp16"].mean() for name in columns}
    lines = [{"method": "fp16", "bits K/V": "16/16", "stored": "16.000", "all-in": "16.00", "loss above fp16": f"(loss {fp16['loss']:.3f})", "KL to fp16": "0",
              "top-1 agreement": "1", "LongBench": f"{fp16['longbench']:.1f}", "needles": f"{fp16['niah']:.1f}"}]  # fmt: skip
    for (quant, key, value), group in rows[rows["panel"].isin(columns)].groupby(["quant", "key_bits", "value_bits"]):
        text = group[group["panel"] == "loss"]
        total = f"{text['bits_total'].mean():.2f}" if len(text) else ""
        line = {"method": style.label(quant), "bits K/V": f"{key:g}/{value:g}", "stored": f"{group['bits_stored'].mean():.3f}", "all-in": total}
        for name, (title, digits) in columns.items():
            part = group[group["panel"] == name]
            line[title] = spread(part["value"], part["stderr"], digits, seeds=True)
        lines.append(line)
    made = Table(
        "Every method at every budget, shipped options; loss and KL in nats per token, top-1 agreement with fp16 as a share of positions, "
        f"scores in percent; {SEEDS}. "
        "Scored in one pass, so an exact window (KIVI's 128 tokens) is seen by the last queries only. All-in bits are of the perplexity run."
        + scores.absent(rows, {name: columns[name][0] for name in ("loss", "longbench", "niah")}, "panel")
    ).add("", pd.DataFrame(lines))
    lines = []
    for (quant, key, value), group in rows[rows["panel"].isin(("streamed", "one pass"))].groupby(["quant", "key_bits", "value_bits"]):
        line = {"method": style.label(quant), "bits K/V": f"{key:g}/{value:g}", "stored": f"{group['bits_stored'].mean():.3f}", "windows": f"{group['n'].max():.0f}"}
        lines.append({**line, **{name: spread(part["value"], part["stderr"]) for name, part in group.groupby("panel")}})
    title = "The same windows in one pass and token by token (task.streamed=true, every query with its exact window): loss above fp16"
    return made.add(title, pd.DataFrame(lines)) if lines else made
