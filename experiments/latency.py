"""Timings of results/latency: of kernels, as their benchmarks write them, and of whole decoding steps, as task=latency and task=latency_compiled
write them to their runs.

Column `kind` tells them apart: kernel, decode attention of one layer; memory, steps at equal memory; part, anything else that was timed; step, whole steps.
"""

import json
from pathlib import Path

import pandas as pd

from experiments import committed
from experiments.tables import Table

SHAPE = r"q(?P<heads>\d+) kv(?P<kv>\d+) d(?P<dim>\d+) b(?P<batch>\d+) t(?P<tokens>\d+)"
EXACT = ("sdpa", "fp16", "flashinfer fp16")
"""Providers of these prefixes attend to an fp16 cache with shared KV heads; the fastest of them is the reference."""
VARIANT = r"( fp16 tables| fp8 tables|,).*"
"""What follows in a provider's name is a variant of one method: the fastest stands for it in figures."""
LIBRARY = "flashinfer"
"""Methods that begin so are another library's, called in many ways: the fastest way stands for them in tables as well, all ways in one of their own."""
GONE = "replaced"
"""In a provider's name: a version that is not in the tree any more. Tables leave it out; kernels/NOTES.md keeps what it taught."""
STEP = r"(?P<memory>b\d+|[\d.]+GB) t\d+ (?P<how>\w+) (?P<route>\w+)(?: compiled)?"
TASKS = ["latency", "latency_compiled"]
"""Tasks that time whole steps; rows of the second say in `compiled` how both sides were compiled."""
VECTOR = ("gsrq", "gskm", "km", "vqllm", "cq")
"""Methods with codebooks begin so; their steps belong to GSRQ's tables, all others to Block-GTQ's."""
MEASURES = {
    "step_ms": "median", "step_ms/p5": "p5", "step_ms/p95": "p95", "fp16_flash_ms": "flash", "fp16_cudnn_ms": "cudnn", "speedup": "speed",
    "tokens_per_second": "per_second", "prefill_ms": "prefill", "fp16_flash_prefill_ms": "flash_prefill", "fp16_cudnn_prefill_ms": "cudnn_prefill",
    "encode_tokens_per_second": "encode",
    "shape/batch": "batch", "shape/tokens": "tokens", "shape/fp16_batch": "fp16_batch", "shape/break_even_tokens": "even", "bytes/cache": "cache",
    "bytes/weights": "weights", "bytes/peak": "peak", "bytes/fp16_flash_peak": "flash_peak", "rate/of_roofline": "of_roofline",
}  # fmt: skip
STEP_COLUMNS = {
    "model": "model", "quant": "quant", "bits": "bits", "bits_stored": "stored bits", "piece": "D", "compiled": "compiled", "memory": "held", "tokens": "tokens each",
    "batch": "sequences", "median": "step, ms", "p5": "p5", "p95": "p95", "flash": "fp16 flash, ms", "cudnn": "fp16 cuDNN, ms", "fp16_batch": "fp16 sequences",
    "speed": "tokens/s over fp16's", "per_second": "tokens/s", "prefill": "prefill, ms", "flash_prefill": "flash prefill, ms", "cudnn_prefill": "cuDNN prefill, ms",
    "encode": "encode, tokens/s", "of_roofline": "share of copy rate", "cache": "cache, GB", "weights": "weights, GB", "peak": "peak, GB",
    "flash_peak": "fp16 peak, GB", "even": "faster from, tokens",
}  # fmt: skip
"""Columns of the table of whole steps, in order, to their titles."""
WHOLE = ["tokens", "batch", "fp16_batch", "per_second", "prefill", "flash_prefill", "cudnn_prefill", "encode", "even"]
"""Of them, those without decimals."""
MISSING = "No whole step has been timed on a GPU yet: `python run.py -m experiment={}` there."


def steps(results: Path, vector: bool) -> pd.DataFrame:
    """One row per example of TASKS that ran as a graph, metrics as columns (`MEASURES`), of several runs the newest; NaN where a part failed. `kind` is step."""
    path = Path(results) / "latency"
    frame = committed.load(path, task=TASKS) if path.is_dir() else pd.DataFrame()
    if frame.empty:
        return frame
    frame = frame[frame["quant"].str.startswith(VECTOR) == vector].assign(piece=lambda f: committed.option(f, "quant.key.piece"))
    frame = frame[frame["subset"].str.fullmatch(STEP)]
    wide = frame.pivot_table(
        index=["model", "quant", "bits", "bits_stored", "piece", "run", "subset", "device", "date"], columns="metric", values="value", dropna=False, observed=True
    )
    wide = wide.dropna(how="all").reindex(columns=list(MEASURES)).rename(columns=MEASURES).reset_index()
    runs = frame.drop_duplicates("run")
    asked = dict(zip(runs["run"], runs["options"].map(lambda options: json.dumps([options["model"], options["quant"]], sort_keys=True))))
    wide = wide.join(wide["subset"].str.extract(STEP)).assign(compiled=wide["run"].map(dict(zip(runs["run"], committed.option(runs, "task.compile")))))
    cell = ["model", "quant", "bits", "compiled", "subset", "device"]
    wide = wide.sort_values("date").groupby([wide["run"].map(asked), *cell], dropna=False, sort=False).last().reset_index(cell)
    return wide[wide["how"] == "graph"].assign(kind="step").sort_values(["model", "quant", "bits", "compiled", "tokens", "batch"], na_position="first", ignore_index=True)


def load(results: Path, file: str) -> pd.DataFrame:
    """Rows of results/latency/<file>.parquet; timings whose outputs were not checked on the device say so in the provider's name."""
    path = Path(results) / "latency" / f"{file}.parquet"
    if not path.is_file():
        return pd.DataFrame(columns=["kernel", "metric", "shape", "provider", "median"])
    frame = pd.read_parquet(path).astype({"shape": str, "provider": str})
    if "checked" in frame:
        frame["provider"] = frame["provider"].where(frame["checked"].astype(bool), frame["provider"] + " (unverified)")
    return frame[~frame["provider"].str.contains(GONE)]


def gather(results: Path, *files: str) -> pd.DataFrame:
    """Decode attention in microseconds and steps at equal memory from files whose kernels had the same shapes, the shape's numbers as columns.

    `fastest` marks the fastest variant of each method and shape, `ratio` is the fastest fp16 time (at equal memory: our tokens per second) over
    the same of this row (of fp16), `times_flash` this row's time over that of flash alone.
    """
    frames = [load(results, file) for file in files]
    frame = pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)
    frame = frame[frame["shape"].str.fullmatch(SHAPE)]
    if frame.empty:
        return frame
    frame = frame.assign(method=frame["provider"].str.replace(VARIANT, "", regex=True))
    frame = frame.join(frame["shape"].str.extract(SHAPE).astype(int))
    times = frame[(frame["kernel"] == "decode_attention") & (frame["metric"] == "time")].assign(kind="kernel")
    times["ratio"] = times["shape"].map(_fp16(times)) / times["median"]
    times["times_flash"] = times["median"] / times["shape"].map(_fp16(times, "flash"))
    times["fastest"] = times.index.isin(times.groupby(["method", "shape"])["median"].idxmin())
    read = frame[frame["metric"] == "of_roofline"].set_index(["provider", "shape"])["median"]
    times = times.join(read.rename("of_roofline"), on=["provider", "shape"])
    off = frame.loc[frame["metric"] == "difference from the definition", "median"]
    times["difference"] = off.max() if len(off) else float("nan")
    filled = frame[frame["kernel"] == "decode_step"].pivot(index=["provider", "method", "shape", "batch", "tokens"], columns="metric", values="median").reset_index()
    if len(filled):
        plain = filled["method"].str.startswith(EXACT)
        speed = filled["throughput at equal memory"]
        filled = filled.assign(kind="memory", ratio=speed / speed[plain].max(), per_second=speed, median=filled["time"])
        filled["fastest"] = filled.index.isin(filled.groupby("method")["median"].idxmin())
        filled = filled.drop(columns=["time", "throughput at equal memory"])
    rows = pd.concat([times, filled] if len(filled) else [times], ignore_index=True)
    return rows.sort_values(["kind", "heads", "kv", "batch", "method", "provider", "tokens"], ignore_index=True)


def _fp16(rows: pd.DataFrame, ending: str = "") -> pd.Series:
    """Microseconds of the fastest fp16 provider per shape."""
    return rows[rows["method"].str.startswith(EXACT) & rows["method"].str.endswith(ending)].groupby("shape")["median"].min()


def both(results: Path, files: list[str], vector: bool, *others: str) -> pd.DataFrame:
    """Everything that belongs to one paper: decode attention of `files`, `others` (files of results/latency, too) as parts, whole steps."""
    parts = [load(results, name).assign(kind="part") for name in others]
    return pd.concat([part for part in (gather(results, *files), *parts, steps(results, vector)) if len(part)] or [pd.DataFrame()], ignore_index=True)


def speedups(rows: pd.DataFrame) -> pd.DataFrame:
    """Coded rows with `ratio`: of kernels, time of the fastest fp16 decode over theirs; at equal memory, their tokens per second over fp16's. fp16
    shares its KV heads in both: `against` is always gqa."""
    rows = rows[rows["kind"].isin(["kernel", "memory"])]
    return rows[~rows["method"].str.startswith(EXACT)].assign(against="gqa")


def whole(rows: pd.DataFrame) -> pd.DataFrame:
    """Whole steps alone, those that were not compiled, peaks in GB as well."""
    steps = rows[rows["kind"] == "step"]
    steps = steps[steps["compiled"].isna()] if len(steps) else steps
    return steps.assign(**{f"{name}_gb": steps[name] / 1e9 for name in ("peak", "flash_peak") if name in steps})


def name(shape: tuple[int, int, int, int]) -> str:
    """Head counts, batch and tokens as a column of a table."""
    heads, kv, batch, tokens = map(int, shape)
    return f"{heads}/{kv}, {batch} x {tokens / 1024:g}K"


def _wide(parts: pd.DataFrame, column: str, form: str) -> pd.DataFrame:
    """One row per provider, one column per shape, numbers as text."""
    wide = parts.pivot_table(index="provider", columns=["heads", "kv", "batch", "tokens"], values=column, sort=True)
    wide.columns = [name(shape) for shape in wide.columns]
    return wide.map(lambda v: "" if v != v else format(v, form)).reset_index()


def _distinct(frame: pd.DataFrame, column: str) -> str:
    return ", ".join(sorted(set(frame[column].dropna().astype(str))))


def tabulate(rows: pd.DataFrame, caption: str, experiment: str) -> Table:
    """Kernels: microseconds and speed by provider and shape; steps at equal memory; other parts. Whole steps below, or one sentence that there are none."""
    parts, memory, others, done = (rows[rows["kind"] == kind] for kind in ("kernel", "memory", "part", "step"))
    spread = ((parts["p95"] - parts["p5"]) / parts["median"]).median()
    off = parts["difference"].max() if len(parts) else float("nan")
    sure = f"Every kernel agreed with its definition at 2,000 tokens of ragged rows first (difference at most {off:.1e})."
    if off != off:
        wrong = parts["provider"].str.contains("unverified").any()
        sure = "What is called unverified gave a wrong output." if wrong else "Every timed output agreed with its definition within 1e-2"
        sure += "" if wrong else ", of XQA's products of fp8 within 6e-2." if parts["provider"].str.contains("fp8, xqa").any() else "."
    commands = "; ".join(f"`{c.strip()}`" for c in sorted(set(parts["command"].astype(str))))
    made = Table(
        f"{caption} {_distinct(parts, 'gpu')}, {_distinct(parts, 'date')}, {commands}. Medians; 5 to 95 % span {spread:.1%} of the median. "
        f"{sure} Columns: query/KV heads, batch x cached tokens." + ("" if len(done) else " " + MISSING.format(experiment))
    )
    ways = parts["method"].astype(str).str.startswith(LIBRARY)
    shown = parts[~ways | parts["fastest"].eq(True)].assign(provider=parts["provider"].where(~ways, parts["method"]))
    made.add("Microseconds", _wide(shown, "median", ",.1f"))
    made.add("Speed against the fastest fp16 with shared KV heads", _wide(shown[~shown["method"].str.startswith(EXACT)], "ratio", ".3f"))
    if parts["of_roofline"].notna().any():
        made.add("Bytes read per second, share of a copy's 4.3 TB/s", _wide(shown, "of_roofline", ".3f"))
    if ways.any():
        title = f"Microseconds of FlashInfer {_distinct(parts, 'flashinfer')} by call, order of a page's axes and tokens per page; the fastest stands above"
        made.add(title, _wide(parts[ways], "median", ",.1f"))
    if len(memory):
        shown = memory.sort_values("per_second", ascending=False)[["provider", "batch", "tokens", "median", "per_second", "ratio"]].astype({"batch": int, "tokens": int})
        shown = shown.rename(columns={"batch": "sequences", "tokens": "tokens each", "median": "ms per step", "per_second": "tokens/s", "ratio": "against fp16"}).round(3)
        made.add("Whole steps at equal memory: 100 GB of cache and codebooks, attention of 32 layers, appends and random weights in the shape of Llama-3-8B", shown)
    for kernel, part in others.groupby("kernel", sort=False):
        where = "; ".join(sorted({f"{g}, {d}, `{c}`" for g, d, c in zip(part["gpu"], part["date"], part["command"])}))
        if not part["shape"].str.fullmatch(SHAPE).all():
            made.add(f"{kernel.replace('_', ' ')} ({where})", part[["shape", "provider", "metric", "median", "p5", "p95", "unit"]])
            continue
        part = part.assign(**part["shape"].str.extract(SHAPE).astype(int))
        for metric, cells in part[part["metric"].isin(["time", "rate"])].groupby("metric", sort=False):
            made.add(f"{kernel.replace('_', ' ')}, {metric} in {cells['unit'].iloc[0]} ({where})", _wide(cells, "median", ",.1f"))
    if len(done):
        gigabytes = done.assign(**{name: (done[name] / 1e9).round(2) for name in ("cache", "weights", "peak", "flash_peak")})
        given = gigabytes[[c for c in STEP_COLUMNS if gigabytes[c].notna().any()]].round(3)
        given = given.assign(**{c: given[c].map(lambda v: "" if v != v else f"{v:,.0f}") for c in WHOLE if c in given}).rename(columns=STEP_COLUMNS)
        where = ", ".join([*sorted(set(done["device"])), *sorted({d[:10] for d in done["date"]})])
        made.add(f"Whole steps in one CUDA graph, milliseconds; a cell is empty where the part did not finish in its time ({where})", given)
    return made
