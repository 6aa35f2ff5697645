"""Kernel timings of results/latency: one row per kernel, provider and shape, as the benchmarks in `kernels/` write them."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import style
from experiments.tables import Table

SHAPE = r"q(?P<heads>\d+) kv(?P<kv>\d+) d(?P<dim>\d+) b(?P<batch>\d+) t(?P<tokens>\d+)"
EXACT = "sdpa"
"""Providers of this prefix attend to an fp16 cache with shared KV heads; the fastest of them is the reference."""


def gather(results: Path, *prefixes: str) -> pd.DataFrame:
    """Decode-attention rows of providers that start with one of `prefixes`, and the fp16 reference, with the shape's numbers as columns."""
    files = sorted(Path(results).glob("latency/*.parquet"))
    frame = pd.concat([pd.read_parquet(f) for f in files], ignore_index=True) if files else pd.DataFrame(columns=["kernel", "provider", "shape"])
    frame = frame[frame["shape"].astype(str).str.fullmatch(SHAPE) & frame["provider"].astype(str).str.startswith((*prefixes, EXACT))]
    if not frame["provider"].astype(str).str.startswith(prefixes).any():
        return frame.iloc[:0]
    numbers = frame["shape"].str.extract(SHAPE).astype(int)
    frame = frame.drop(columns=[c for c in numbers if c in frame]).join(numbers)
    return frame.sort_values(["kernel", "heads", "kv", "batch", "provider", "tokens"], ignore_index=True)


def reference(rows: pd.DataFrame) -> pd.Series:
    """Microseconds of the fastest fp16 provider per shape."""
    return rows[rows["provider"].str.startswith(EXACT)].groupby("shape")["microseconds"].min()


def speedups(rows: pd.DataFrame) -> pd.DataFrame:
    """Time of the fastest fp16 decode with shared KV heads over each provider's time; `against` is always gqa."""
    coded = rows[~rows["provider"].str.startswith(EXACT)]
    return coded.assign(ratio=coded["shape"].map(reference(rows)) / coded["microseconds"], against="gqa")


def name(provider: str) -> str:
    """The method behind a provider such as blockgtq_k3v3, for its colour."""
    known = [method for method in style.COLORS if provider.startswith(method)]
    return "fp16" if provider.startswith(EXACT) else max(known, key=len) if known else "tq_mse" if provider.startswith("tq") else provider


def figure(rows: pd.DataFrame):
    """Left: microseconds against cached tokens at batch 1. Right: bytes read per second, as a share of what a large copy reaches."""
    part = rows[rows["batch"] == 1]
    shapes = sorted(part.groupby(["heads", "kv"]).groups)
    drawing, axes = plt.subplots(1, len(shapes) + 1, figsize=(style.PAGE, 2.6))
    dashes = ("-", "--", ":", "-.")
    for axis, (heads, kv) in zip(axes, shapes):
        ends = []
        for provider, line in part[(part["heads"] == heads) & (part["kv"] == kv)].groupby("provider"):
            siblings = sorted(p for p in part["provider"].unique() if name(p) == name(provider))
            bars = [line["microseconds"] - line["p5"], line["p95"] - line["microseconds"]]
            axis.errorbar(
                line["tokens"],
                line["microseconds"],
                bars,
                color=style.color(name(provider)),
                linestyle=dashes[siblings.index(provider) % 4],
                marker="o",
                markersize=2.5,
                capsize=1.5,
            )
            ends.append((float(line["microseconds"].iloc[-1]), provider.replace("_", " "), style.color(name(provider))))
        style.plain_log(axis)
        axis.xaxis.set_major_formatter(lambda v, _: f"{v / 1024:g}K")
        style.plain_log(axis, "y", 10)
        axis.set_xlabel("cached tokens")
        axis.set_title(f"{heads} query heads, {kv} KV heads")
        style.name_ends(axis, ends)
    axes[0].set_ylabel("decode attention, one layer\n(microseconds)")
    axis = axes[-1]
    longest = part[part["tokens"] == part.groupby("provider")["tokens"].transform("max")]
    share = (100 * longest.groupby("provider")["roofline"].mean()).sort_values()
    axis.barh(range(len(share)), share, color=[style.color(name(p)) for p in share.index])
    axis.set_yticks(range(len(share)), [p.replace("_", " ") for p in share.index])
    axis.set_xlabel("bandwidth reached\n(percent of a copy)")
    axis.grid(False)
    return drawing


def tabulate(rows: pd.DataFrame, caption: str) -> Table:
    """Microseconds, bytes and speed-up per shape and provider."""
    fast = rows.assign(ratio=rows["shape"].map(reference(rows)) / rows["microseconds"])
    shown = fast[["kernel", "shape", "provider", "microseconds", "p5", "p95", "bytes", "tb_per_s", "ratio"]].round(3)
    date, gpu, command = (", ".join(sorted(set(rows[c].astype(str)))) for c in ("date", "gpu", "command"))
    return Table(f"{caption} {gpu}, {date}. `{command}`").add("", shown.rename(columns={"ratio": "speed against fp16 GQA"}))
