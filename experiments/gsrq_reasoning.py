"""GSRQ Tables 4, 5 and 9: tasks that generate: written arithmetic and needles on the stand-in, GSM8K, MATH-500, RULER and AIME elsewhere."""

from pathlib import Path

import pandas as pd

from experiments import scores

QUANTS = ("gskm", "gsrq", "vqllm", "kivi")
TITLES = {
    "aime": "written arithmetic\n(percent, mean of repeats)",
    "niah": "needles found (percent)",
    "gsm8k": "GSM8K (percent)",
    "math500": "MATH-500 (percent)",
    "ruler": "RULER (percent)",
}


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    return scores.gather(results, model, dict.fromkeys(TITLES, "score"), QUANTS)


def draw(rows: pd.DataFrame):
    return scores.figure(rows, list(TITLES.items()))


def table(rows: pd.DataFrame):
    columns = [(task, title.split("\n")[0]) for task, title in TITLES.items() if (rows["task"] == task).any()]
    made = scores.tabulate(rows, "Scores in percent.", columns, 1)
    made.add("Reported (GSRQ Table 4, GSM8K exact match)", scores.published("gsrq", "T4", index=["model"], columns="method_budget"))
    made.add("Reported (GSRQ Table 5, Llama-3-8B-Instruct)", scores.published("gsrq", "T5", index=["task"], columns="method_budget"))
    return made.add("Reported (GSRQ Table 9, Qwen3-8B)", scores.published("gsrq", "T9", index=["task"], columns="method_budget"))
