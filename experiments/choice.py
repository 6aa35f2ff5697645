"""Which committed runs are a method as its YAML ships it, and what a run changed: read from the run's own configuration."""

import json
from functools import cache
from pathlib import Path

import pandas as pd
import yaml

CONF = Path(__file__).resolve().parent.parent / "conf"


@cache
def shipped(quant: str) -> dict:
    """conf/quant/<quant>.yaml flattened to {dotted key: value}, interpolations and bits left out; empty if it is gone."""
    path = CONF / "quant" / f"{quant}.yaml"
    flat = flatten(yaml.safe_load(path.read_text())) if path.is_file() else {}
    return {k: v for k, v in flat.items() if not k.endswith("bits") and not str(v).startswith("${")}


def flatten(node: dict, prefix: str = "") -> dict:
    """Nested mappings to {dotted key: value}."""
    flat = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def changes(quant: str, config: str) -> dict:
    """Options in which a run differs from the shipped YAML of its method: {dotted key: value}."""
    ran = flatten(json.loads(config)["quant"])
    return {k: ran[k] for k, v in shipped(quant).items() if k in ran and ran[k] != v and not (isinstance(v, float) and float(ran[k]) == v)}


def default_runs(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of runs that changed no option of their quantizer and used the default prefill."""
    runs = rows.drop_duplicates("run")
    plain = {r.run for r in runs.itertuples() if not changes(r.quant, r.config) and json.loads(r.config)["prefill"] == "quantized"}
    return rows[rows.run.isin(plain)]


def averages(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row per run for a metric: its average over subsets, or its only subset."""
    chosen = rows[rows.metric == metric]
    several = chosen.groupby("run")["subset"].transform("nunique") > 1
    return chosen[~several | (chosen.subset == "average")]
