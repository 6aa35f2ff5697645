"""Block-GTQ Table 4, Figures 5 and 9: needles found by method, kind, length and depth."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import committed, scores, style
from experiments.tables import Table

QUANTS = ("fp16", "tq_mse", "blockgtq", "blockgtq_plus", "kivi_scale_only")


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """One row per prompt: kind, length, depth, score."""
    frame = committed.load(results, model=model, task="niah", quant=list(QUANTS))
    frame = committed.one_setting(committed.shipped(frame))
    if not (frame["quant"] != "fp16").any():
        return frame.iloc[:0]
    frame = frame.assign(key_bits=committed.option(frame, "quant.key.bits").astype(float), value_bits=committed.option(frame, "quant.value.bits").astype(float))
    found = committed.records(results, frame, key_bits="key_bits", value_bits="value_bits")
    length = found["subset"].str.split("@").str[1].astype(int)
    return found.assign(length=length, model=model)[["quant", "key_bits", "value_bits", "bits_stored", "seed", "kind", "length", "depth", "score", "model"]]


def draw(rows: pd.DataFrame):
    """Heat maps, length across and depth down, all kinds together, of the lowest budget from 2 bits on that three methods ran."""
    methods = rows[rows["quant"] != "fp16"].groupby("key_bits")["quant"].nunique()
    bits = min(b for b, count in methods.items() if count >= min(3, methods.max()) and (b >= 2 or methods.index.max() < 2))
    shown = [q for q in QUANTS if ((rows["quant"] == q) & ((rows["key_bits"] == bits) | (q == "fp16"))).any()]
    figure, axes = plt.subplots(1, len(shown), figsize=(style.PAGE, 2.2), sharey=True, squeeze=False)
    for axis, quant in zip(axes[0], shown):
        part = rows[(rows["quant"] == quant) & ((rows["key_bits"] == bits) | (quant == "fp16"))]
        grid = part.pivot_table(index="depth", columns="length", values="score")
        image = axis.imshow(grid.to_numpy(), vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for i, line in enumerate(grid.to_numpy()):
            for j, value in enumerate(line):
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=6, color="black" if value > 55 else "white")
        axis.set_xticks(range(grid.shape[1]), [f"{n:,}" for n in grid.columns])
        axis.set_yticks(range(grid.shape[0]), [f"{100 * d:.0f}" for d in grid.index])
        axis.set_title("fp16" if quant == "fp16" else f"{style.label(quant)}\n{style.bits(bits)}: {part['score'].mean():.1f} %", fontsize=7)
        axis.set_xlabel("prompt tokens")
        axis.grid(False)
    axes[0][0].set_ylabel("depth of the needle (percent)")
    figure.colorbar(image, ax=axes[0][-1], label="found (percent)")
    return figure


def table(rows: pd.DataFrame) -> Table:
    kinds = rows.pivot_table(index=["quant", "key_bits", "value_bits"], columns="kind", values="score").round(1)
    kinds["average"] = kinds.mean(axis=1).round(1)
    lengths = rows.pivot_table(index=["quant", "key_bits", "value_bits"], columns="length", values="score").round(1)
    lengths.columns = [f"{n} tokens" for n in lengths.columns]
    kinds["seeds"] = lengths["seeds"] = rows.groupby(["quant", "key_bits", "value_bits"])["seed"].nunique()
    n = int(rows.groupby(["quant", "key_bits", "value_bits", "seed"]).size().min())
    made = Table(
        f"Needles found in percent, {n} prompts per method, budget and seed; averages are over seeds; "
        f"a difference of two standard errors is about {2 * (0.25 / n) ** 0.5 * 100:.0f} points at worst."
    )
    made.add("By kind", kinds.reset_index()).add("By length", lengths.reset_index())
    for name, model in (("T4a", "Llama-3.1-8B-Instruct"), ("T4b", "Qwen2.5-7B-Instruct")):
        made.add(f"Reported (Block-GTQ Table 4, {model})", scores.published("blockgtq", name, index=["method", "budget"], columns="task"))
    return made
