"""Timings of results/latency: of kernels, as their benchmarks write them, and of whole decoding steps, as task=latency writes them to its runs."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import committed, style
from experiments.tables import Table

SHAPE = r"q(?P<heads>\d+) kv(?P<kv>\d+) d(?P<dim>\d+) b(?P<batch>\d+) t(?P<tokens>\d+)"
EXACT = ("sdpa", "fp16")
"""Providers of these prefixes attend to an fp16 cache with shared KV heads; the fastest of them is the reference."""
VARIANT = r"( fp16 tables| fp8 tables|,).*"
"""What follows in a provider's name is a variant of one method: the fastest stands for it."""


STEP = r"(?P<memory>b\d+|[\d.]+GB) t\d+ (?P<how>\w+) (?P<route>\w+)"
VECTOR = ("gsrq", "gskm", "km", "vqllm", "cq")
"""Methods with codebooks begin so; their steps belong to GSRQ's tables, all others to Block-GTQ's."""
MEASURES = {
    "step_ms": "median", "step_ms/p5": "p5", "step_ms/p95": "p95", "fp16_flash_ms": "flash", "fp16_cudnn_ms": "cudnn", "speedup": "speed",
    "tokens_per_second": "per_second", "prefill_ms": "prefill", "fp16_flash_prefill_ms": "flash_prefill", "encode_tokens_per_second": "encode",
    "shape/batch": "batch", "shape/tokens": "tokens", "shape/fp16_batch": "fp16_batch", "shape/break_even_tokens": "even", "bytes/cache": "cache",
    "bytes/weights": "weights", "bytes/peak": "peak", "bytes/fp16_flash_peak": "flash_peak", "rate/of_roofline": "of_roofline",
}  # fmt: skip
MISSING = "No whole step has been timed on a GPU yet: `python run.py -m experiment={}` there."


def steps(results: Path, vector: bool) -> pd.DataFrame:
    """One row per run and example of task=latency that ran as a graph, metrics as columns (`MEASURES`); NaN where a part failed. `kind` is step."""
    path = Path(results) / "latency"
    frame = committed.load(path, task="latency") if path.is_dir() else pd.DataFrame()
    if frame.empty:
        return frame
    frame = frame[frame["quant"].str.startswith(VECTOR) == vector].assign(piece=lambda f: committed.option(f, "quant.key.piece"))
    frame = frame[frame["subset"].str.fullmatch(STEP)]
    wide = frame.pivot_table(
        index=["model", "quant", "bits", "bits_stored", "piece", "run", "subset", "device", "date"], columns="metric", values="value", dropna=False, observed=True
    )
    wide = wide.dropna(how="all").reindex(columns=list(MEASURES)).rename(columns=MEASURES).reset_index()
    wide = wide.join(wide["subset"].str.extract(STEP))
    return wide[wide["how"] == "graph"].assign(kind="step").sort_values(["model", "quant", "bits", "tokens", "batch"], ignore_index=True)


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
    frame = frame.assign(method=method, kind="kernel")
    frame = frame.loc[frame.groupby(["method", "shape"])["median"].idxmin()]
    return frame.join(frame["shape"].str.extract(SHAPE).astype(int)).sort_values(["heads", "kv", "batch", "method", "tokens"], ignore_index=True)


def reference(rows: pd.DataFrame) -> pd.Series:
    """Microseconds of the fastest fp16 provider per shape."""
    return rows[rows["method"].str.startswith(EXACT)].groupby("shape")["median"].min()


def both(results: Path, file: str, vector: bool) -> pd.DataFrame:
    """Kernel rows and whole steps, told apart by column `kind`."""
    return pd.concat([part for part in (gather(results, file), steps(results, vector)) if len(part)] or [pd.DataFrame()], ignore_index=True)


def kernels(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["kind"] == "kernel"]


def speedups(rows: pd.DataFrame) -> pd.DataFrame:
    """Time of the fastest fp16 decode with shared KV heads over each method's time; `against` is always gqa."""
    rows = kernels(rows)
    coded = rows[~rows["method"].str.startswith(EXACT)]
    return coded.assign(ratio=coded["shape"].map(reference(rows)) / coded["median"], against="gqa")


def color(method: str) -> str:
    """fp16 grey; scalar codes by method; vector codes in GSRQ's colour, rebuilding first in its lighter one."""
    known = {"sdpa": "fp16", "fp16": "fp16", "tq": "tq_mse", "blockgtq": "blockgtq", "int4": "int4", "fp8": "fp8", "codes": "gsrq", "rebuild": "gskm"}
    return next((style.color(name) for prefix, name in known.items() if method.startswith(prefix)), style.color(method))


def figure(rows: pd.DataFrame):
    """Microseconds of decode attention against cached tokens, one panel per head shape at batch 1, and its speed against fp16; below, where there
    are any, milliseconds of whole steps, one panel per model, and their speed."""
    whole = rows[rows["kind"] == "step"]
    part = kernels(rows)
    part = part[part["batch"] == 1]
    shapes, models = sorted(part.groupby(["heads", "kv"]).groups), sorted(whole["model"].unique()) if len(whole) else []
    across = max(len(shapes), len(models)) + 1
    figure, grid = plt.subplots(2 if models else 1, across, figsize=(style.PAGE, 5.2 if models else 2.7), squeeze=False)
    axes = grid[0]
    dashes = ("-", "--", ":", "-.")
    order = {m: sorted(x for x in part["method"].unique() if color(x) == color(m)).index(m) for m in part["method"].unique()}
    for axis, (heads, kv) in zip(axes, shapes):
        for method, line in part[(part["heads"] == heads) & (part["kv"] == kv)].groupby("method"):
            bars = [line["median"] - line["p5"], line["p95"] - line["median"]]
            look = {"color": color(method), "linestyle": dashes[order[method] % 4], "marker": "osD^v"[order[method] % 5], "markersize": 3}
            axis.errorbar(line["tokens"], line["median"], bars, capsize=1.5, label=method.replace("_", " "), **look)
        style.plain_log(axis, "y", 10)
        axis.set_title(f"{heads} query heads, {kv} KV heads")
    axes[0].set_ylabel("decode attention of one layer\n(microseconds)")
    for method, line in speedups(part).groupby("method"):
        for _, cells in line.groupby(["heads", "kv"]):
            axes[-1].plot(cells["tokens"], cells["ratio"], color=color(method), linestyle=dashes[order[method] % 4], marker="osD^v"[order[method] % 5], markersize=3)
    if models:
        _steps(grid[1], whole, models)
    for line in grid:
        line[-1].axhline(1, color=style.color("fp16"), linewidth=0.8)
        line[-1].set_ylim(bottom=0)
        line[-1].set_title("speed against fp16, shared KV heads")
        for axis in line:
            if not axis.has_data():
                axis.set_axis_off()
                continue
            style.plain_log(axis)
            axis.xaxis.set_major_formatter(lambda v, _: f"{v / 1024:g}K")
            axis.set_xlabel("cached tokens")
    named = {text: handle for axis in grid.flat for handle, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=4)
    return figure


def _steps(axes, whole: pd.DataFrame, models: list[str]) -> None:
    one = whole[whole["memory"] == "b1"]
    for axis, model in zip(axes, models):
        here = one[one["model"] == model]
        for (quant, bits), line in here.groupby(["quant", "bits"]):
            bars = [line["median"] - line["p5"], line["p95"] - line["median"]]
            style.points(axis, line["tokens"], line["median"], None, quant, text=f"{style.label(quant)}, {style.bits(bits)}, whole step")
            axis.errorbar(line["tokens"], line["median"], bars, color=style.color(quant), linestyle="none", capsize=1.5)
            axes[-1].plot(line["tokens"], line["speed"], color=style.color(quant), marker=style.marker(quant), markersize=3)
        fastest = here[["flash", "cudnn"]].min(axis=1).groupby(here["tokens"]).min()
        axis.plot(fastest.index, fastest, color=style.color("fp16"), label="fp16, whole step")
        style.plain_log(axis, "y", 10)
        axis.set_title(model.removeprefix("random_").replace("_", " "))
    axes[0].set_ylabel("whole step, one sequence\n(milliseconds)")


def tabulate(rows: pd.DataFrame, caption: str, experiment: str) -> Table:
    """Kernels: microseconds and speed per shape and method. Whole steps below, or one sentence that there are none."""
    parts = kernels(rows)
    fast = parts.assign(speed=(parts["shape"].map(reference(parts)) / parts["median"]).round(3))
    shown = fast[["shape", "provider", "median", "p5", "p95", "speed"]].round(3)
    date, gpu, command = (", ".join(sorted(set(parts[c].astype(str)))) for c in ("date", "gpu", "command"))
    whole = rows[rows["kind"] == "step"]
    made = Table(f"{caption} {gpu}, {date}. `{command}`" + ("" if len(whole) else " " + MISSING.format(experiment)))
    made.add("", shown.rename(columns={"median": "microseconds", "speed": "speed against fp16 with shared KV heads"}))
    if len(whole):
        gigabytes = whole.assign(**{name: (whole[name] / 1e9).round(2) for name in ("cache", "weights", "peak")})
        columns = ["model", "quant", "bits", "bits_stored", "piece", "memory", "tokens", "batch", "median", "p5", "p95", "flash", "cudnn", "fp16_batch", "speed", "per_second",
                   "prefill", "flash_prefill", "encode", "of_roofline", "cache", "weights", "peak", "even"]  # fmt: skip
        given = gigabytes[[c for c in columns if gigabytes[c].notna().any()]].round(3)
        where = ", ".join([*sorted(set(whole["device"])), *sorted({d[:10] for d in whole["date"]})])
        made.add(f"Whole steps in one CUDA graph, milliseconds (cache, weights and peak in GB; {where})", given)
    return made
