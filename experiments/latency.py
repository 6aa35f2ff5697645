"""Kernel timings of results/latency, as the benchmarks write them: one row per kernel, provider, shape and metric."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import style
from experiments.tables import Table

SHAPE = r"q(?P<heads>\d+) kv(?P<kv>\d+) d(?P<dim>\d+) b(?P<batch>\d+) t(?P<tokens>\d+)"
EXACT = ("sdpa", "fp16")
"""Providers of these prefixes attend to an fp16 cache with shared KV heads; the fastest of them is the reference."""
VARIANT = r"( fp16 tables| fp8 tables|,).*"
"""What follows in a provider's name is a variant of one method: the fastest stands for it."""


def gather(results: Path, file: str) -> pd.DataFrame:
    """Decode attention in microseconds from results/latency/<file>.parquet, the fastest variant of each method, the shape's numbers as columns.

    Timings whose outputs were not checked on the device say so in the method's name.
    """
    path = Path(results) / "latency" / f"{file}.parquet"
    frame = pd.read_parquet(path) if path.is_file() else pd.DataFrame(columns=["kernel", "metric", "shape", "provider", "median"])
    frame = frame[(frame["kernel"] == "decode_attention") & (frame["metric"] == "time") & frame["shape"].astype(str).str.fullmatch(SHAPE)]
    if frame.empty:
        return frame
    method = frame["provider"].str.replace(VARIANT, "", regex=True)
    if "checked" in frame:  # outputs compared with the definition in the same run
        method = method.where(frame["checked"].astype(bool), method + " (unverified)")
        frame = frame.assign(provider=frame["provider"].where(frame["checked"].astype(bool), frame["provider"] + " (unverified)"))
    frame = frame.assign(method=method)
    frame = frame.loc[frame.groupby(["method", "shape"])["median"].idxmin()]
    return frame.join(frame["shape"].str.extract(SHAPE).astype(int)).sort_values(["heads", "kv", "batch", "method", "tokens"], ignore_index=True)


def reference(rows: pd.DataFrame) -> pd.Series:
    """Microseconds of the fastest fp16 provider per shape."""
    return rows[rows["method"].str.startswith(EXACT)].groupby("shape")["median"].min()


def speedups(rows: pd.DataFrame) -> pd.DataFrame:
    """Time of the fastest fp16 decode with shared KV heads over each method's time; `against` is always gqa."""
    coded = rows[~rows["method"].str.startswith(EXACT)]
    return coded.assign(ratio=coded["shape"].map(reference(rows)) / coded["median"], against="gqa")


def color(method: str) -> str:
    """fp16 grey; scalar codes by method; vector codes in GSRQ's colour, rebuilding first in its lighter one."""
    known = {"sdpa": "fp16", "fp16": "fp16", "tq": "tq_mse", "blockgtq": "blockgtq", "int4": "int4", "fp8": "fp8", "codes": "gsrq", "rebuild": "gskm"}
    return next((style.color(name) for prefix, name in known.items() if method.startswith(prefix)), style.color(method))


def figure(rows: pd.DataFrame):
    """Microseconds against cached tokens, one panel per head shape at batch 1, and the speed against fp16 of the last shape."""
    part = rows[rows["batch"] == 1]
    shapes = sorted(part.groupby(["heads", "kv"]).groups)
    figure, axes = plt.subplots(1, len(shapes) + 1, figsize=(style.PAGE, 2.7))
    dashes = ("-", "--", ":", "-.")
    order = {m: sorted(x for x in part["method"].unique() if color(x) == color(m)).index(m) for m in part["method"].unique()}
    for axis, (heads, kv) in zip(axes, shapes):
        for method, line in part[(part["heads"] == heads) & (part["kv"] == kv)].groupby("method"):
            bars = [line["median"] - line["p5"], line["p95"] - line["median"]]
            text = method.replace("_", " ")
            axis.errorbar(
                line["tokens"],
                line["median"],
                bars,
                color=color(method),
                linestyle=dashes[order[method] % 4],
                marker="osD^v"[order[method] % 5],
                markersize=3,
                capsize=1.5,
                label=text,
            )
        style.plain_log(axis, "y", 10)
        axis.set_title(f"{heads} query heads, {kv} KV heads")
    axes[0].set_ylabel("decode attention of one layer\n(microseconds)")
    for method, line in speedups(part).groupby("method"):
        for _, cells in line.groupby(["heads", "kv"]):
            axes[-1].plot(cells["tokens"], cells["ratio"], color=color(method), linestyle=dashes[order[method] % 4], marker="osD^v"[order[method] % 5], markersize=3)
    axes[-1].axhline(1, color=style.color("fp16"), linewidth=0.8)
    axes[-1].set_ylim(bottom=0)
    axes[-1].set_title("speed against fp16, shared KV heads")
    for axis in axes:
        style.plain_log(axis)
        axis.xaxis.set_major_formatter(lambda v, _: f"{v / 1024:g}K")
        axis.set_xlabel("cached tokens")
    named = {text: handle for axis in axes[:-1] for handle, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=4)
    return figure


def tabulate(rows: pd.DataFrame, caption: str) -> Table:
    """Microseconds and speed per shape and method."""
    fast = rows.assign(speed=(rows["shape"].map(reference(rows)) / rows["median"]).round(3))
    shown = fast[["shape", "provider", "median", "p5", "p95", "speed"]].round(3)
    date, gpu, command = (", ".join(sorted(set(rows[c].astype(str)))) for c in ("date", "gpu", "command"))
    return Table(f"{caption} {gpu}, {date}. `{command}`").add("", shown.rename(columns={"median": "microseconds", "speed": "speed against fp16 with shared KV heads"}))
