"""Records per layer and KV head of the key diagnostics (logit_mae, attention), and who wins them."""

from pathlib import Path

import pandas as pd

from experiments import committed


def gather(results: Path, model: str, task: str, quants: tuple[str, ...], allowed: tuple[str, ...] = ()) -> pd.DataFrame:
    """One row per method, key bits, seed, layer and head, with the task's metrics and the run's stored bits."""
    frame = committed.one_setting(committed.shipped(committed.load(results, model=model, task=task, quant=list(quants)), allowed))
    if frame.empty:
        return frame
    frame = frame.assign(key_bits=committed.option(frame, "quant.key.bits").astype(float), score=committed.option(frame, "quant.key.score"))
    found = committed.records(results, frame, key_bits="key_bits", score="score")
    return found.assign(model=model).sort_values(["quant", "key_bits", "seed", "layer", "head"], ignore_index=True)


def wins(rows: pd.DataFrame, metric: str, ours: str = "blockgtq", theirs: str = "tq_mse", larger: bool = False) -> pd.DataFrame:
    """Per budget: heads and layers (means over seeds) where `ours` is better, of how many, and the mean reduction 1 - ours / theirs."""
    wide = rows.pivot_table(index=["key_bits", "layer", "head"], columns="quant", values=metric)
    if not {ours, theirs} <= set(wide.columns):
        return pd.DataFrame(columns=["heads", "of_heads", "layers", "of_layers", "reduction"])
    wide = wide.dropna(subset=[ours, theirs])
    sign = 1 if larger else -1
    by_layer = wide.groupby(["key_bits", "layer"]).mean()
    heads, layers = ((sign * (frame[ours] - frame[theirs]) > 0).groupby("key_bits").agg(["sum", "size"]) for frame in (wide, by_layer))
    mean = wide.groupby("key_bits").mean()
    return pd.DataFrame({"heads": heads["sum"], "of_heads": heads["size"], "layers": layers["sum"], "of_layers": layers["size"], "reduction": 1 - mean[ours] / mean[theirs]})


def means(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Per method and budget: stored bits and the metric's mean over heads, with mean and standard deviation over seeds."""
    seeds = rows.groupby(["quant", "key_bits", "seed"]).agg(x=("bits_stored", "mean"), y=(metric, "mean"))
    return seeds.groupby(["quant", "key_bits"]).agg(x=("x", "mean"), y=("y", "mean"), spread=("y", "std"), seeds=("y", "size"))
