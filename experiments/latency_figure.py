"""The figure of decode timings: one row of panels for kernels, one for whole steps where there are any."""

import re

import matplotlib.pyplot as plt
import pandas as pd

from experiments import style
from experiments.latency import EXACT

ASIDE = r"int4|blockgtq_tiles_k2v2|flashinfer fp16|rebuild.*|codes shared.*|codes 1 bit d8|codes .*d64|codes 0.75 bit d32|codes after RoPE .*d128"
"""Methods that the table has and the figure leaves out, so that its lines can be told apart."""
KNOWN = {"sdpa": "fp16", "fp16": "fp16", "tq": "tq_mse", "blockgtq_tiles": "blockgtq_tiles", "blockgtq": "blockgtq", "int4": "int4", "fp8": "fp8", "codes": "gsrq",
         "flashinfer fp16": "fp16", "flashinfer fp8": "fp8"}  # fmt: skip
"""How a method of the benchmarks begins, to its name in style; the first that fits."""
FEW = 7
"""Methods whose names fit beside their lines; more stand in a legend."""
TUNED = ("", "default")
"""How compiled steps that the figure shows were compiled; others are in the table."""
LINES = {"k2v2": "--", "cudnn": "--", "0.75 bit": "--", "after RoPE": ":", "d32": "-.", "flashinfer": ":"}
"""Line style by the first of these words that a method has; else solid."""

SHAPES = {"random_qwen25_3b": "Qwen2.5-3B", "random_qwen25_7b": "Qwen2.5-7B", "random_llama31_8b": "Llama-3.1-8B"}
"""Models with random weights, by the shape that they have."""


def known(method: str) -> str:
    return next((found for prefix, found in KNOWN.items() if method.startswith(prefix)), method)


def line(method: str) -> str:
    return next((style for word, style in LINES.items() if word in method), "-")


def label(method: str) -> str:
    """A benchmark's method in words."""
    if method.startswith(("sdpa", "fp16")):
        return f"fp16, {'cuDNN' if 'cudnn' in method else 'flash'}"
    if method.startswith("flashinfer"):
        return method.replace("flashinfer", "FlashInfer")
    if method.startswith("codes"):
        bits, piece = re.search(r"([\d.]+) bit d(\d+)", method).groups()
        return f"{float(bits):g} bit, D = {piece}" + (", post-RoPE" if "RoPE" in method else "")
    widths = re.search(r"_(k\d+v\d+)", method)
    return style.label(known(method)).removesuffix(" (ours)") + (f" {widths[1].upper()}" if widths else "") + (" (unverified)" if "unverified" in method else "")


def draw(rows: pd.DataFrame):
    """Above: microseconds of decode attention against cached tokens at batch 1, one panel per head shape, speed against the fastest fp16 for the
    last of them, and tokens per second at equal memory where measured. Below, for whole steps: milliseconds, one panel per model, speed and peak memory."""
    shown = rows[(rows["kind"] != "kernel") | (rows["batch"] == 1) & rows["fastest"].eq(True) & ~rows["method"].astype(str).str.fullmatch(ASIDE)]
    part, memory, whole = (shown[shown["kind"] == kind] for kind in ("kernel", "memory", "step"))
    whole = whole[whole["compiled"].fillna("").isin(TUNED)] if len(whole) else whole
    named = part["method"].nunique() <= FEW
    shapes, models = sorted(part.groupby(["heads", "kv"]).groups), list(whole.groupby(["model", whole["compiled"].fillna("")]).groups) if len(whole) else []
    across = max(len(shapes) + 1 + bool(len(memory)) + (not named), len(models) + 2 + bool(len(_equal(whole))) if models else 0)
    figure, grid = plt.subplots(1 + bool(models), across, figsize=(style.PAGE, 4.6 if models else 2.4), squeeze=False)
    for axis, (heads, kv) in zip(grid[0], shapes):
        _times(axis, part[(part["heads"] == heads) & (part["kv"] == kv)], named=named and (heads, kv) == shapes[-1])
        axis.set_title(f"{heads:g}/{kv:g} heads" + (", 8-bit codebooks" if part["provider"].str.contains("fp8 tables").any() else ""))
    grid[0][0].set_ylabel("attention of one layer (\u00b5s)")
    _speeds(grid[0][len(shapes)], part[(part["heads"] == shapes[-1][0]) & (part["kv"] == shapes[-1][1])])
    grid[0][len(shapes)].set_title("{:g}/{:g} heads".format(*shapes[-1]))
    grid[0][len(shapes)].set_ylabel("speed (fastest fp16 = 1)")
    if len(memory):
        best = memory[memory["fastest"].eq(True)]
        fp16 = best["method"].str.startswith(EXACT)
        best = best[~fp16 | (best["per_second"] == best.loc[fp16, "per_second"].max())]
        texts = ["fp16" if m.startswith(EXACT) else label(m) for m in best["method"]]
        _bars(grid[0][len(shapes) + 1], texts, best["per_second"], best["batch"], [style.color(known(m)) for m in best["method"]])
    if not named:
        handles = {line.get_label(): line for line in grid[0][0].containers}
        grid[0][-1].legend(handles.values(), handles, loc="center left", frameon=False, fontsize=6.5, handlelength=2.6)
        grid[0][-1].set_axis_off()
    if models:
        _steps(grid[1], whole, models, named)
    for axis in grid.flat if named else [axis for axis in grid.flat if axis is not grid[0][-1]]:
        if not axis.has_data():
            axis.remove()
    return figure


def _tokens(axis) -> None:
    style.plain_log(axis)
    ticks = [t for t in (2.0**n for n in range(9, 22, 2)) if axis.get_xlim()[0] <= t * 1.01 and t <= axis.get_xlim()[1] * 1.01]
    axis.set_xticks(ticks, [f"{t / 1024:g}K" if t < 2**20 else f"{t / 2**20:g}M" for t in ticks])
    axis.set_xlabel("cached tokens")


def _times(axis, part: pd.DataFrame, named: bool) -> None:
    ends = []
    for method, cells in part.groupby("method"):
        cells = cells.sort_values("tokens")
        bars = [cells["median"] - cells["p5"], cells["p95"] - cells["median"]]
        name = known(method)
        look = {"color": style.color(name), "linestyle": line(method), "marker": style.marker(name), "markersize": 3, "capsize": 1.5}
        axis.errorbar(cells["tokens"], cells["median"], bars, label=label(method), **look)
        ends.append((float(cells["median"].iloc[-1]), label(method), style.color(name)))
    style.plain_log(axis, "y", 10)
    _tokens(axis)
    if named:
        style.name_ends(axis, ends)


def _speeds(axis, part: pd.DataFrame) -> None:
    """Fastest fp16 over each method's time."""
    for method, cells in part[~part["method"].str.startswith(EXACT)].groupby("method"):
        cells = cells.sort_values("tokens")
        axis.plot(cells["tokens"], cells["ratio"], color=style.color(known(method)), linestyle=line(method), marker=style.marker(known(method)), markersize=3)
    _unity(axis)


def _unity(axis) -> None:
    axis.axhline(1, color=style.color("fp16"), linewidth=0.8)
    axis.set_ylim(0, 1.05 * max(1, axis.dataLim.y1))
    _tokens(axis)


def _bars(axis, texts: list[str], values, sequences, colours: list[str]) -> None:
    """Tokens per second at equal memory, name and number of sequences written on each bar."""
    order = sorted(range(len(texts)), key=lambda i: -list(values)[i])
    for place, i in enumerate(order):
        value, count = list(values)[i], list(sequences)[i]
        axis.barh(-place, value, color=colours[i], height=0.35)
        axis.annotate(f"{texts[i]}: {count:.0f} sequences", (0, -place), xytext=(1, 9), textcoords="offset points", fontsize=6.5, va="bottom")
        inside = value > max(values) / 5  # a short bar has its number behind it
        at, colour = (0, "white") if inside else (value, "black")
        axis.annotate(f"{value:.0f}", (at, -place), xytext=(3, 0), textcoords="offset points", fontsize=6.5, va="center", color=colour)
    axis.set_yticks([])
    axis.set_ylim(-len(order) + 0.5, 0.75)
    axis.grid(False, axis="y")
    axis.set_axisbelow(True)
    axis.set_xlabel("tokens per second")
    axis.set_title("100 GB, 32K tokens each")


def _equal(whole: pd.DataFrame) -> pd.DataFrame:
    """Steps whose batch fills a given memory, those that were not compiled."""
    return whole[whole["memory"].str.endswith("GB") & whole["per_second"].notna() & whole["compiled"].isna()] if len(whole) else whole


def _called(quant: str, bits: float, piece: float, many: bool) -> str:
    return f"{style.label(quant)} {style.bits(bits)}" + (f", D = {piece:g}" if many else "")


def _steps(axes, whole: pd.DataFrame, models: list[tuple[str, str]], named: bool) -> None:
    """Milliseconds of one sequence's step by model, once more (open markers) where it was compiled, speed against the fastest fp16, peak memory, and tokens
    per second at equal memory."""
    one, equal = whole[whole["memory"] == "b1"].dropna(subset=["median"]), _equal(whole)
    groups, styles = ["quant", "bits", "piece"], ("-", "--", "-.", ":")
    for axis, (model, compiled) in zip(axes, models):
        here, ends = one[(one["model"] == model) & (one["compiled"].fillna("") == compiled)], []
        for at, ((quant, bits, piece), cells) in enumerate(here.groupby(groups, dropna=False)):
            many = cells["quant"].iloc[0] in set(here.loc[here["piece"] != piece, "quant"]) and piece == piece
            look = {"color": style.color(quant), "marker": style.marker(quant), "markersize": 3, "linestyle": styles[at % 4] if named else "-"}
            look |= {"markerfacecolor": "white"} if compiled else {}
            axis.errorbar(cells["tokens"], cells["median"], [cells["median"] - cells["p5"], cells["p95"] - cells["median"]], capsize=1.5, **look)
            axes[len(models)].plot(cells["tokens"], cells["speed"], **look)
            axes[len(models) + 1].plot(cells["tokens"], cells["peak"] / 1e9, **look)
            if len(cells) == 1 and named:  # a lone point is named where it lies
                at_end = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "va": "center", "fontsize": 6.5}
                axis.annotate(_called(quant, bits, piece, many), (cells["tokens"].iloc[0], cells["median"].iloc[0]), color=style.color(quant), **at_end)
                continue
            ends.append((float(cells["median"].iloc[-1]), _called(quant, bits, piece, many), style.color(quant)))
        fastest = here[["flash", "cudnn"]].min(axis=1).groupby(here["tokens"]).min()
        axis.plot(fastest.index, fastest, color=style.color("fp16"))
        if len(fastest.dropna()):
            ends.append((float(fastest.dropna().iloc[-1]), "fp16", style.color("fp16")))
        plain = here.groupby("tokens")["flash_peak"].min() / 1e9
        axes[len(models) + 1].plot(plain.index, plain, color=style.color("fp16"))
        style.plain_log(axis, "y", 10)
        _tokens(axis)
        if named:
            style.name_ends(axis, ends)
        axis.set_title("shape of " + SHAPES.get(model, model) + (", compiled" if compiled else ""))
    axes[0].set_ylabel("whole step, one sequence (ms)")
    _unity(axes[len(models)])
    axes[len(models)].set_ylabel("speed (fastest fp16 = 1)")
    axes[len(models) + 1].set_ylim(bottom=0)
    _tokens(axes[len(models) + 1])
    axes[len(models) + 1].set_ylabel("peak memory, weights included (GB)")
    if len(equal):
        first = equal.iloc[0]
        texts = ["fp16", *(_called(q, b, p, equal["piece"].nunique() > 1) for q, b, p in zip(equal["quant"], equal["bits"], equal["piece"]))]
        values = [1e3 * first["fp16_batch"] / min(v for v in (first["flash"], first["cudnn"]) if v == v), *equal["per_second"]]
        _bars(axes[len(models) + 2], texts, values, [first["fp16_batch"], *equal["batch"]], [style.color("fp16"), *map(style.color, equal["quant"])])
