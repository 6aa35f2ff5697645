"""GSRQ Tables 6 and 11: k-means, GSKM and log weights inside the same pipeline; both coded, keys only, values only."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import committed, reported, scores, style
from experiments.tables import Table, spread

QUANTS = ("km", "gskm", "gsrq")


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    frame = committed.one_setting(committed.load(results, model=model, task="perplexity", quant=list(QUANTS), metric="loss_minus_fp16"))
    if frame.empty:
        return frame
    key, value = (committed.option(frame, f"quant.{kind}._target_") for kind in ("key", "value"))
    coded = ["values" if "fp16" in k else "keys" if "fp16" in v else "both" for k, v in zip(key, value)]
    bits = [v if c == "values" else k for k, v, c in zip(committed.option(frame, "quant.key.bits"), committed.option(frame, "quant.value.bits"), coded)]
    frame = frame.assign(coded=coded, coded_bits=bits)
    plain = [_shipped(r) for r in frame.itertuples()]
    return frame[plain][["quant", "coded", "coded_bits", "seed", "value", "stderr", "model"]].sort_values(["coded", "quant", "coded_bits", "seed"], ignore_index=True)


def _shipped(row) -> bool:
    from experiments.choice import changes

    other = {"keys": "value.", "values": "key."}.get(row.coded, "neither")
    return not [k for k in changes(row.quant, row.config) if not k.startswith(other)]


def draw(rows: pd.DataFrame):
    panels = [c for c in ("both", "keys", "values") if (rows["coded"] == c).any()]
    figure, axes = plt.subplots(1, len(panels), figsize=(style.PAGE if len(panels) > 1 else style.COLUMN, 2.5), squeeze=False, sharey=True)
    for axis, coded in zip(axes[0], panels):
        ends = []
        for quant in QUANTS:
            part = rows[(rows["coded"] == coded) & (rows["quant"] == quant)].groupby("coded_bits").agg(y=("value", "mean"), s=("value", "std"), e=("stderr", "mean"))
            if len(part):
                style.points(axis, part.index, part.y, part.s.fillna(part.e), quant)
                ends.append((float(part.y.iloc[-1]), style.label(quant), style.color(quant)))
        style.plain_log(axis)
        axis.minorticks_off()
        style.plain_log(axis, "y", 10)
        axis.set_title({"both": "keys and values coded", "keys": "keys only", "values": "values only"}[coded])
        axis.set_xlabel("bits per coded value")
        style.name_ends(axis, ends)
    axes[0][0].set_ylabel(scores.LOSS)
    return figure


def table(rows: pd.DataFrame) -> Table:
    wide = rows.groupby(["coded", "quant", "coded_bits"]).apply(lambda g: spread(g["value"], g["stderr"]), include_groups=False).unstack("coded_bits").reset_index()
    wide.columns = [c if isinstance(c, str) else f"{c:g} bits" for c in wide.columns]
    paper = reported.table("gsrq", "T11", "T6").pivot_table(index=["quantised", "method"], columns="budget", values="value", sort=False).reset_index()
    return Table("Loss above fp16 (nats per token). Start as shipped: k-means++ for KM, spherical for GSKM and GSRQ; start_effect crosses them.").add("Here", wide.fillna("")).add(
        "Reported, perplexity (GSRQ Tables 6 and 11, Llama-3-8B, fp16 5.54)", paper)  # fmt: skip
