"""Block-GTQ Table 15: which score hands out the bits, at 2 bits. qk_mse, the weight of the squared logit error, is ours."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from experiments import choice, committed, scores, style
from experiments.tables import Table, spread

ORDER = ("qk_avg", "qk_max", "k_only", "qk_product", "q_only", "qk_mse")
PANELS = {"logit_mae": "logit MAE", "kl": "KL to exact attention (nats)", "score": "needles found (percent)"}


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    frame = committed.load(results, model=model, quant="blockgtq", task=["logit_mae", "attention", "niah"])
    frame = committed.one_setting(committed.shipped(frame, ("key.score",)))
    frame = frame[frame["bits"] == 2]
    parts = [choice.averages(frame, metric) for metric in PANELS]
    found = pd.concat(parts) if len(frame) else frame
    if found.empty:
        return found
    found = found.assign(score=committed.option(found, "quant.key.score"))
    swept = found.groupby("metric")["score"].nunique()
    found = found[found["metric"].isin(swept[swept > 2].index)]
    return found[["metric", "score", "seed", "value", "stderr", "model"]].sort_values(["metric", "score", "seed"], ignore_index=True)


def draw(rows: pd.DataFrame):
    panels = [p for p in PANELS if (rows["metric"] == p).any()]
    figure, axes = plt.subplots(1, len(panels), figsize=(style.PAGE if len(panels) > 1 else style.COLUMN, 2.2), squeeze=False, sharey=True)
    for axis, metric in zip(axes[0], panels):
        for place, score in enumerate(reversed(ORDER)):
            part = rows[(rows["metric"] == metric) & (rows["score"] == score)]
            if len(part):
                error = part["value"].std() if len(part) > 1 else part["stderr"].iloc[0]
                axis.errorbar(part["value"].mean(), place, xerr=error, fmt="o", color=style.color("blockgtq_plus" if score == "qk_mse" else "blockgtq"), capsize=2)
        axis.set_yticks(range(len(ORDER)), [f"{s} (ours)" if s == "qk_mse" else f"{s} (paper)" if s == "qk_avg" else s for s in reversed(ORDER)])
        axis.set_xlabel(PANELS[metric])
    return figure


def table(rows: pd.DataFrame) -> Table:
    wide = (
        rows.groupby(["score", "metric"]).apply(lambda g: spread(g["value"], g["stderr"]), include_groups=False).unstack("metric").rename(columns=PANELS).reset_index().fillna("")
    )
    return Table("Block-GTQ at 2 bits by score; mean ± standard deviation over seeds (one seed: standard error).").add("Here", wide).add(
        "Reported, needles found (Block-GTQ Table 15, Llama-3.1-8B-Instruct, K2V2, one run)", scores.published("blockgtq", "T15", index=["score"], columns="task"))  # fmt: skip
