"""Block-GTQ Table 5: LongBench at K3V3, K3V2 and K2V2, Block-GTQ against uniform TQ-MSE and KIVI-ScaleOnly."""

from pathlib import Path

import pandas as pd

from experiments import scores

QUANTS = ("tq_mse", "blockgtq", "kivi_scale_only")


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    return scores.gather(results, model, {"longbench": "score"}, QUANTS)


def draw(rows: pd.DataFrame):
    return scores.figure(rows, [("longbench", "LongBench, mean of subsets (percent)")])


def table(rows: pd.DataFrame):
    made = scores.tabulate(rows, "LongBench in percent; stored bits include norms, which the paper's budgets leave out.", [("longbench", "LongBench")], 1)
    return made.add("Reported (Block-GTQ Table 5, Llama-3.1-8B-Instruct)", scores.published("blockgtq", "T5", index=["task"], columns="method_budget"))
