"""The papers' numbers, results/reported/*.csv, and which of our models they were measured on."""

import functools
from pathlib import Path

import pandas as pd

MODELS = {
    "llama2_7b": "Llama-2-7B", "llama3_8b": "Llama-3-8B", "mistral_7b": "Mistral-7B-v0.1", "llama3_8b_instruct": "Llama-3-8B-Instruct",
    "mistral_7b_instruct": "Mistral-7B-Instruct-v0.1", "qwen3_8b": "Qwen3-8B", "llama31_8b_instruct": "Llama-3.1-8B-Instruct",
    "qwen25_7b_instruct": "Qwen2.5-7B-Instruct", "qwen25_3b": "Qwen2.5-3B", "qwen25_3b_instruct": "Qwen2.5-3B-Instruct",
    "qwen25_14b_instruct": "Qwen2.5-14B-Instruct", "qwen3_30b_a3b": "Qwen3-30B-A3B", "r1_llama_8b": "DeepSeek-R1-Distill-Llama-8B",
    "r1_qwen_7b": "DeepSeek-R1-Distill-Qwen-7B", "mistral_nemo": "Mistral-Nemo-Instruct-2407", "glm4_9b": "GLM-4-9B", "deepseek_v2_lite": "DeepSeek-V2-Lite",
}  # fmt: skip
"""conf/model to the papers' name. The stand-in stands in for none of them."""
METHODS = {"GSRQ": "gsrq", "FP16": "fp16", "fp16": "fp16", "VQLLM": "vqllm", "CQ": "cq", "KIVI": "kivi", "Block-GTQ": "blockgtq", "TQ-MSE": "tq_mse",
           "KIVI-ScaleOnly": "kivi_scale_only", "RQ-KM": "km", "RQ-GSKM": "gskm", "RQ-GSKM-log": "gsrq"}  # fmt: skip


@functools.cache
def read(paper: str, folder: Path = Path("results/reported")) -> pd.DataFrame:
    """All published numbers of `gsrq`, `blockgtq` or `baselines`; empty cells are empty strings, value is a float or NaN."""
    frame = pd.read_csv(folder / f"{paper}.csv", dtype=str, keep_default_na=False)
    return frame.assign(value=pd.to_numeric(frame["value"], errors="coerce"))


def table(paper: str, *names: str, **where) -> pd.DataFrame:
    """Rows of some tables or figures, filtered by column; keys of `subset` become columns."""
    frame = read(paper)
    frame = frame[frame["table"].isin(names)]
    pairs = frame["subset"].map(lambda s: dict(p.split("=", 1) for p in s.split(";") if "=" in p))
    frame = frame.drop(columns="subset").join(pd.DataFrame(pairs.tolist(), index=frame.index))
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    return frame


def on(model: str, frame: pd.DataFrame) -> pd.DataFrame:
    """The part of a published table that was measured on one of our models; nothing for the stand-in."""
    return frame[frame["model"] == MODELS.get(model, "")]
