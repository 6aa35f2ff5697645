"""Which committed runs are a method as its YAML ships it, and what a run changed: read from the run's own configuration."""

import json
from functools import cache
from pathlib import Path

import pandas as pd
import yaml

CONF = Path(__file__).resolve().parent.parent / "conf"


@cache
def shipped(quant: str) -> dict:
    """conf/quant/<quant>.yaml flattened to {dotted key: value}, bits left out; empty if it is gone."""
    path = CONF / "quant" / f"{quant}.yaml"
    flat = flatten(yaml.safe_load(path.read_text())) if path.is_file() else {}
    return {k: v for k, v in flat.items() if not k.endswith("bits")}


def flatten(node: dict, prefix: str = "") -> dict:
    """Nested mappings to {dotted key: value}."""
    flat = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def changes(quant: str, config: str) -> dict:
    """Options in which a run differs from the shipped YAML of its method, those it adds (+quant.key.tile=8) among them: {dotted key: value}.

    What the YAML takes from another option is that option's change.
    """
    given, ran = shipped(quant), flatten(json.loads(config)["quant"])
    differ = {k: ran[k] for k, v in given.items() if k in ran and ran[k] != v and not str(v).startswith("${") and not (isinstance(v, float) and float(ran[k]) == v)}
    return differ | ({k: v for k, v in ran.items() if k not in given and not k.endswith("bits")} if given else {})


def averages(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row per run for a metric: its average over subsets, or its only subset."""
    chosen = rows[rows.metric == metric]
    several = chosen.groupby("run")["subset"].transform("nunique") > 1
    return chosen[~several | (chosen.subset == "average")]
