"""GSRQ Tables 3 and 8: LongBench scores against stored bits."""

from pathlib import Path

import pandas as pd

from experiments import reported, scores

QUANTS = ("gskm", "gsrq", "vqllm", "kivi")


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    return scores.gather(results, model, {"longbench": "score"}, QUANTS)


def draw(rows: pd.DataFrame):
    figure = scores.figure(rows, [("longbench", "LongBench, mean of subsets (percent)")])
    scores.overlay(figure.axes[0], reported.table("gsrq", "T3", "T8", metric="mean"), rows["model"].iloc[0])
    return figure


def table(rows: pd.DataFrame):
    made = scores.tabulate(rows, "LongBench, unweighted mean of subsets in percent (embedded documents on the stand-in).", [("longbench", "LongBench")], 1)
    made.add("Reported (GSRQ Table 3, Llama-3-8B-Instruct)", scores.published("gsrq", "T3", index=["task"], columns="method_budget"))
    return made.add("Reported (GSRQ Table 8, Qwen3-8B)", scores.published("gsrq", "T8", index=["task"], columns="method_budget"))
