"""The printed table of one run: score beside fp16 on the same examples, three bit numbers, tokens, seconds."""

import sys

import pandas as pd
from rich.console import Console
from rich.table import Table

from kvq.statistics import WEAK

WIDTH = 150


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def say(sentence: str) -> None:
    """Print one line for the user."""
    _console().print(sentence, highlight=False)


def show(frame: pd.DataFrame) -> pd.DataFrame:
    """Print `frame` (one run) and return it."""
    console = _console()
    first = frame.iloc[0]
    once = frame[frame.subset == "run"].set_index("metric")["value"]
    table = Table(title=f"{first.task} · {first['quant']} · {first.model} · data={first['data']}", title_justify="left")
    paired = [m for m in frame.metric.unique() if m.endswith("_minus_fp16")]
    scores = frame[frame.subset != "run"]
    plain = [m for m in scores.metric if "/" not in m] or list(scores.metric)
    main = paired[0].removesuffix("_minus_fp16") if paired else plain[0]
    everywhere = scores.groupby("metric", sort=False)["subset"].nunique() == scores["subset"].nunique()
    others = [m for m in everywhere.index[everywhere] if not m.startswith(f"{main}_") and m not in (main, WEAK) and "/" not in m]
    # A metric with a slash is one of a series (a stage, a quantile): it is in the rows and would not fit here.
    weak = list(scores.subset[(scores.metric == WEAK) & (scores.value > 0)])
    for name in ("subset", main, "fp16", "minus fp16", *others, "n"):
        table.add_column(name, justify="left" if name == "subset" else "right")
    for subset, rows in frame[frame.subset != "run"].groupby("subset", sort=False):
        cells = rows.set_index("metric")
        shown = [_cell(cells, m) for m in (main, f"{main}_fp16", f"{main}_minus_fp16", *others)]
        counted = str(cells.loc[main if main in cells.index else cells.index[0], "n"])  # an example that failed has no score
        table.add_row(f"{subset} *" if subset in weak else subset, *shown, counted, style="bold" if subset == "average" else None)
    console.print(table)
    if weak:
        console.print("* fp16 is too close to guessing to tell methods apart (row fp16_too_weak)", highlight=False)
    console.print(
        f"bits: {first.bits:g} nominal, {first.bits_stored:.3f} stored per value, {first.bits_total:.2f} all-in with codebooks for one sequence"
        f" · {once['compression']:.2f}x smaller than fp16 · {first.encoded_tokens:,} of {int(once['tokens']):,} tokens encoded",
        highlight=False,
    )
    seconds = " · ".join(f"{name.removesuffix('_seconds')} {value:.1f} s" for name, value in once.items() if name.endswith("_seconds"))
    console.print(f"{seconds} · run {first.run} on {first.device}", highlight=False)
    return frame


def _cell(cells: pd.DataFrame, metric: str) -> str:
    if metric not in cells.index:
        return ""
    value, stderr = cells.loc[metric, "value"], cells.loc[metric, "stderr"]
    if pd.isna(stderr):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.3f} ± {stderr:.3f}" if abs(value) < 10 else f"{value:.1f} ± {stderr:.1f}"
