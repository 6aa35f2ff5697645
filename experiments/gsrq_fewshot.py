"""GSRQ Tables 2 and 7: multiple choice by likelihood, scored in one forward over coded keys and values."""

from pathlib import Path

import pandas as pd

from experiments import scores

QUANTS = ("gskm", "gsrq", "vqllm", "kivi")
TASKS = {"choices": "score", "fewshot": "score"}


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    return scores.gather(results, model, TASKS, QUANTS)


def draw(rows: pd.DataFrame):
    return scores.figure(rows, [("choices", "multiple choice (percent)"), ("fewshot", "seven tasks, mean (percent)")])


def table(rows: pd.DataFrame):
    made = scores.tabulate(
        rows,
        "Accuracy in percent; the stand-in answers its own embedded items, models of the paper the seven public tasks.",
        [("choices", "choices"), ("fewshot", "seven tasks")],
        1,
    )
    made.add("Reported, accuracy in percent (GSRQ Table 2)", scores.published("gsrq", "T2", index=["task"], columns="method_budget"))
    return made.add("Reported (GSRQ Table 7; its fp16 is near chance on several tasks)", scores.published("gsrq", "T7", index=["task"], columns="method_budget"))
