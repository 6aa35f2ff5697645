"""GSRQ Figure 8: loss against rounds of GSKM, none stopped early."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import committed, reported, scores, style
from experiments.tables import Table

OPTIONS = tuple(f"{kind}.cluster.{name}" for kind in ("key", "value") for name in ("rounds", "tolerance"))


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    frame = committed.load(results, model=model, task="perplexity", quant="gskm", metric="loss_minus_fp16")
    frame = committed.shipped(frame, OPTIONS)
    frame = committed.one_setting(frame[committed.option(frame, "quant.key.cluster.tolerance") == 0]) if len(frame) else frame
    return (
        frame.assign(rounds=committed.option(frame, "quant.key.cluster.rounds"))[["rounds", "bits", "seed", "value", "stderr", "model"]].sort_values(["bits", "rounds"])
        if len(frame)
        else frame
    )


def draw(rows: pd.DataFrame):
    """One line per budget; both axes logarithmic."""
    figure, axis = plt.subplots(figsize=(style.COLUMN, 2.5))
    ends = []
    for shade, (bits, part) in zip(("#9ECAE1", "#56B4E9", "#0072B2", "#003A5D"), rows.groupby("bits")):
        line = part.groupby("rounds")["value"].mean()
        axis.plot(line.index, line, color=shade, marker="o")
        ends.append((float(line.iloc[-1]), style.bits(bits), shade))
    style.plain_log(axis)
    ticks = [r for r in sorted(rows["rounds"].unique()) if r != 80]  # its number would touch that of 100
    axis.set_xticks(ticks, [str(r) for r in ticks])
    axis.minorticks_off()
    style.plain_log(axis, "y", 10)
    axis.set_xlabel("rounds of GSKM per stage")
    axis.set_ylabel(scores.LOSS)
    style.name_ends(axis, ends)
    return figure


def table(rows: pd.DataFrame) -> Table:
    wide = rows.pivot_table(index="bits", columns="rounds", values="value").round(4).reset_index()
    paper = reported.table("gsrq", "Fig8").pivot_table(index="budget", columns="max_iterations", values="value", sort=False).reset_index()
    return Table("Loss above fp16 (nats per token) by rounds of GSKM; one seed.").add("Here", wide).add("Reported, perplexity (GSRQ Figure 8, Llama-3-8B)", paper)
