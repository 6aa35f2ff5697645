"""Block-GTQ Figure 1: energy of every RoPE block, query and key apart, and the width that the block gets at 3 bits on average."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments import style, widths


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    return widths.gather(results, model, (3.0,))


def draw(rows: pd.DataFrame):
    """Left: median block energy over layers and heads, with quartiles. Right: the most skewed head, energy and width per block."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(style.PAGE, 2.6))
    ends = []
    for kind, colour, text in (("query_energy", "#0072B2", "queries"), ("key_energy", "#D55E00", "keys")):
        energy = np.array([head for layer in rows[kind] for head in layer])
        energy = energy / energy.mean(1, keepdims=True)
        low, middle, high = np.quantile(energy, (0.25, 0.5, 0.75), axis=0)
        left.plot(middle, color=colour)
        left.fill_between(range(len(middle)), low, high, color=colour, alpha=0.2, linewidth=0)
        ends.append((float(middle[-1]), text, colour))
    style.plain_log(left, "y", 10)
    left.set_xlabel("RoPE block (fast to slow rotation)")
    left.set_ylabel("energy, mean of the head = 1")
    style.name_ends(left, ends)
    heads = [(r.layer, h, np.array(k) + np.array(q), np.array(w)) for r in rows.itertuples() for h, (k, q, w) in enumerate(zip(r.key_energy, r.query_energy, r.widths))]
    layer, head, energy, width = max(heads, key=lambda item: item[2].max() / np.median(item[2]))
    right.bar(range(len(width)), width, width=1.0, color=[widths.SHADES[w - 1] for w in width], edgecolor="0.5", linewidth=0.3)
    right.set_ylim(0, 9)
    right.set_xlabel(f"RoPE block of layer {layer}, head {head}")
    right.set_ylabel("width (bits)")
    twin = right.twinx()
    twin.plot(energy / np.median(energy), color="#0072B2", linewidth=0.9)
    style.plain_log(twin, "y", 10)
    twin.set_ylabel("energy over the head's median", color="#0072B2")
    twin.grid(False)
    return figure
