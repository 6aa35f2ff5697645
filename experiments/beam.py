"""Partial sums kept while encoding, 1 to 8: error, loss and what encoding takes. The decoder does not change.

`python -m experiments.beam` times the encoding of 2,048 tokens of the stand-in's width at 1 bit, one thread.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import committed, style
from experiments.tables import Table

NAME = "beam.parquet"
OPTIONS = ("key.beam", "value.beam")
PANELS = {
    "error": "held-out squared error\n(percent of greedy's)",
    "loss": "loss against greedy\n(nats per token)",
    "seconds": "encoding one layer's keys\n(milliseconds per 1,000 tokens)",
}


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """Per budget, beam and quantity: mean over layers or windows of the paired difference to greedy encoding, and its standard error."""
    frame = committed.load(results, model=model, task=["reconstruction", "perplexity"], quant="gskm")
    frame = committed.one_setting(committed.shipped(frame, OPTIONS))
    frame = frame[frame["seed"] == frame["seed"].min()] if len(frame) else frame
    lines = []
    for task, part in frame.groupby("task") if len(frame) else ():
        part = part.assign(beam=committed.option(part, "quant.key.beam"))
        records = committed.records(results, part, beam="beam")
        for bits, mine in records.groupby("bits"):
            if mine["beam"].nunique() < 2:
                continue
            if task == "reconstruction":
                mine = mine[mine["subset"].str.endswith("heldout")].assign(what=lambda t: t["subset"].str.split().str[0])
                wide = mine.pivot_table(index=["what", "id"], columns="beam", values="relative")
                paired = 100 * wide.div(wide[1], axis=0)
            else:
                wide = mine.assign(what="loss").pivot_table(index=["what", "id"], columns="beam", values="loss")
                paired = wide.sub(wide[1], axis=0)
            for (what, beam), values in paired.stack().groupby(["what", "beam"]):
                panel = "error" if task == "reconstruction" else "loss"
                lines.append({"panel": panel, "what": what, "bits": bits, "beam": beam, "value": values.mean(), "stderr": values.sem()})
    if (results / NAME).is_file() and model == "standin" and lines:
        lines += pd.read_parquet(results / NAME).to_dict("records")
    found = pd.DataFrame(lines, columns=["panel", "what", "bits", "beam", "value", "stderr"])
    swept = found.groupby(["panel", "bits"])["beam"].transform("nunique") > 1
    return found[swept].assign(model=model).sort_values(["panel", "what", "bits", "beam"], ignore_index=True)


def draw(rows: pd.DataFrame):
    shown = [p for p in PANELS if (rows["panel"] == p).any()]
    figure, axes = plt.subplots(1, len(shown), figsize=(style.PAGE if len(shown) > 1 else style.COLUMN, 2.3), squeeze=False)
    for axis, panel in zip(axes[0], shown):
        ends = []
        for (what, bits), line in rows[rows["panel"] == panel].groupby(["what", "bits"]):
            colour = {"key": "#0072B2", "value": "#D55E00"}.get(what, style.color("gskm"))
            axis.errorbar(line["beam"], line["value"], line["stderr"].fillna(0), color=colour, marker="o", capsize=2, elinewidth=0.8)
            ends.append((float(line["value"].iloc[-1]), f"{what}s" if panel == "error" else style.bits(bits), colour))
        style.plain_log(axis)
        axis.set_xticks(sorted(rows["beam"].unique()), [str(b) for b in sorted(rows["beam"].unique())])
        axis.set_xlabel("beam width")
        axis.set_ylabel(PANELS[panel])
        if panel == "seconds":
            axis.set_ylim(bottom=0)
        style.name_ends(axis, ends)
    return figure


def table(rows: pd.DataFrame) -> Table:
    named = rows.assign(value=rows["value"].round(4), panel=rows["panel"].replace({"seconds": "time"}))
    wide = named.pivot_table(index=["bits", "panel", "what"], columns="beam", values="value").reset_index()
    wide.columns = [str(c) for c in wide.columns]
    return Table(
        "GSKM encoded with a beam: held-out squared error in percent of greedy's, loss against greedy in nats, "
        "milliseconds to encode 1,000 tokens of one layer's keys on one CPU thread."
    ).add("", wide)


def measure(tokens: int = 2048, repeats: int = 5) -> pd.DataFrame:
    """Milliseconds per 1,000 tokens, median and standard error: 2 pieces of 128 channels, 16 stages of 256 entries, random tables."""
    import time

    import torch

    from kernels import rvq

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, tables = torch.randn(2, tokens, 128, generator=generator), torch.randn(2, 16, 256, 128, generator=generator).half()
    lines = []
    for beam in (1, 2, 4, 8):
        taken = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            rvq.encode(x, tables, beam)
            taken.append(1e6 * (time.perf_counter() - start) / tokens)
        taken = pd.Series(taken[1:])
        lines.append({"panel": "seconds", "what": "cpu, one thread", "bits": 1.0, "beam": beam, "value": taken.median(), "stderr": taken.sem()})
    return pd.DataFrame(lines)


if __name__ == "__main__":
    measure().to_parquet(Path("results") / NAME, index=False)
