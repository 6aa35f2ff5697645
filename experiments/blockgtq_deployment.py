"""Block-GTQ Figure 6, Tables 18 to 21: decode attention from packed scalar codes, against an fp16 cache whose KV heads are shared."""

from pathlib import Path

import pandas as pd

from experiments import latency, latency_figure, reported


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    return latency.both(results, ["decode_attention", "flashinfer"], False, "encode") if model == "standin" else pd.DataFrame()


speedups, whole = latency.speedups, latency.whole
draw = latency_figure.draw


def table(rows: pd.DataFrame):
    made = latency.tabulate(rows, "Decode attention of one layer.", "blockgtq_deployment")
    for name, title in (("T19", "latency, Table 19"), ("T20", "memory, Table 20")):
        paper = reported.table("blockgtq", name).pivot_table(index=["context", "method"], columns="metric", values="value", sort=False).reset_index()
        made.add(f"Reported ({title}, one H800, whole model)", paper)
    return made
