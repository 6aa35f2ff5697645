"""GSRQ Table 1: perplexity at sub-2-bit rates beside CQ, VQLLM and KIVI; the paper's rows are of other models and have no codebook bits."""

import math
from pathlib import Path

import pandas as pd

from experiments import reported, scores

QUANTS = ("gskm", "gsrq", "vqllm", "cq", "kivi")


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    return scores.gather(results, model, {"perplexity": "loss_minus_fp16"}, QUANTS)


def draw(rows: pd.DataFrame):
    figure = scores.figure(rows, [("perplexity", scores.LOSS)])
    paper = reported.table("gsrq", "T1", metric="perplexity", data="wikitext2")
    fp16 = paper[paper["method"] == "FP16"].set_index("model")["value"]
    excess = paper[paper["method"] != "FP16"].assign(value=lambda t: [math.log(r.value / fp16[r.model]) for r in t.itertuples()])
    scores.overlay(figure.axes[0], excess, rows["model"].iloc[0])
    return figure


def table(rows: pd.DataFrame):
    made = scores.tabulate(
        rows,
        "Loss above fp16 in nats per token on held-out text (all-in bits: codebooks charged to one sequence of the window's length); fp16 row: its loss.",
        [("perplexity", "loss above fp16")],
    )
    return made.add("Reported, perplexity (GSRQ Table 1, other models)", scores.published("gsrq", "T1", index=["model", "data", "method"], columns="budget"))
