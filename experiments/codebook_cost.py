"""What a value costs all in, codebooks included, against the tokens that share them: where vector quantizers pay.

All-in bits at T cached tokens = stored bits + table bits / T. The table's size is taken from the rows of this model; for an 8B model of
the papers it follows from GSRQ's configuration: 16 * stages * entries / T extra bits (FP16 tables, width cancels).
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments import committed, scores, style
from experiments.tables import Table

SHOWN = (("gsrq", 1.0), ("gsrq", 2.0), ("cq", 1.0), ("vqllm", 1.0), ("blockgtq", 2.0), ("int4", 4.0))
TOKENS = np.logspace(10, 20, 41, base=2)
GSRQ_STAGES, ENTRIES = {2.0: 32, 1.0: 16, 0.75: 12, 0.375: 12}, 256


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """One row per method and budget: stored bits, and table bits times tokens per value."""
    found = scores.gather(results, model, {"perplexity": "loss_minus_fp16"})
    if found.empty:
        return found
    runs = committed.load(results, model=model, task="perplexity")
    context = float(committed.option(runs, "task.context").iloc[0])
    exact = committed.option(runs, "quant.window", 0).set_axis(runs["run"]).to_dict()
    windowed = {r.quant for r in runs.itertuples() if exact[r.run]}
    found = found[~found["quant"].isin(windowed)]  # an exact window is no table: its share falls with the length as well
    found = found.groupby(["quant", "bits"], as_index=False).agg(stored=("bits_stored", "mean"), total=("bits_total", "mean"))
    return found.assign(table=(found["total"] - found["stored"]) * context, model=model)


def draw(rows: pd.DataFrame):
    figure, axis = plt.subplots(figsize=(style.COLUMN * 1.35, 2.9))
    ends = []
    for quant, bits in SHOWN:
        part = rows[(rows["quant"] == quant) & (rows["bits"] == bits)]
        if len(part):
            cost = part["stored"].iloc[0] + part["table"].iloc[0] / TOKENS
            axis.plot(TOKENS, cost, color=style.color(quant), linestyle="-" if bits == 1.0 else "--")
            ends.append((float(cost[-1]), f"{style.label(quant)}, {style.bits(bits)}", style.color(quant)))
    axis.axhline(16, color=style.color("fp16"), linewidth=0.8, linestyle=":")
    ends.append((16.0, "fp16", style.color("fp16")))
    axis.set_xscale("log", base=2)
    axis.set_xticks([2**n for n in (10, 12, 14, 16, 18, 20)], ["1K", "4K", "16K", "64K", "256K", "1M"])
    axis.minorticks_off()
    style.plain_log(axis, "y")
    axis.set_ylim(0.7, 128)
    axis.set_xlabel("cached tokens that share the tables")
    axis.set_ylabel("all-in bits per value")
    style.name_ends(axis, ends)
    return figure


def table(rows: pd.DataFrame) -> Table:
    lines = []
    for row in rows.itertuples():
        cells = {f"{t // 1024}K": f"{row.stored + row.table / t:.2f}" for t in (2048, 8192, 65536, 1048576)}
        lines.append(
            {
                "method": style.label(row.quant),
                "bits": row.bits,
                "stored": f"{row.stored:.3f}",
                **cells,
                "tokens to fall below 16 bits": "always" if row.table <= 0 else f"{row.table / (16 - row.stored):,.0f}" if row.stored < 16 else "never",
            }
        )
    paper = [{"bits": b, "stages": r, **{f"{t // 1024}K": round(b + 16 * r * ENTRIES / t, 3) for t in (8192, 65536, 1048576)}} for b, r in GSRQ_STAGES.items()]
    return Table("All-in bits per value at a number of cached tokens: codes, norms and one copy of all tables.").add("This model's tables", pd.DataFrame(lines)).add(
        "GSRQ as configured in its paper, any model (derived: 16 R K / T extra bits)", pd.DataFrame(paper))  # fmt: skip
