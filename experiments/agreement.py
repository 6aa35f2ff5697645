"""Scores through the kernels against scores through decode-then-SDPA: pairs of runs that differ in `attention` alone, example by example.

Both runs of a pair hold the same codecs to the last bit (rows before that was written down: the same options and seed, one campaign).
A run whose `attention` is `fused` either read codes as they lie or was refused; on a CPU that is done by the kernels' torch definition. No
figure: the differences are zeros, or a number that a table shows better.

Where prompts read codes, the routes need not hold the same codes: a last bit of an activation can move a code, and every later layer amplifies
it. One prompt of 967 tokens, KIVI at 2 bits, float32, torch's definition of the kernels: 1 of 53,248 key codes differs in layer 1 and 4,054 in
layer 6. Where prompts are attended in full precision, both routes hold the same codes of the prompt, and the kernels are compared alone, but for
the tokens that are generated: an answer of 48 tokens reads codes of its own, and one changed code may change the rest of it.
"""

import json
from pathlib import Path

import pandas as pd

from experiments import committed, style
from experiments.tables import Table
from kvq import results as store

SAME = 0.99
"""Least share of examples whose answers must be equal, character by character."""
LOSS = 1e-2
"""Largest difference of the mean loss in nats per token, half the standard error of 16 windows' mean."""
PROMPTS = {"exact": "in full precision", "quantized": "reads codes"}


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """One row per pair of runs: n, equal answers (share; NaN for losses), mean scores or losses of both, largest differences, and whether the tolerance is met."""
    folder = Path(results) / "agreement"
    runs = store.load(folder, model=model).drop_duplicates("run")
    runs = runs[runs["quant"] != "fp16"]
    config = runs["config"].map(json.loads)
    told = config.map(lambda config: config["identity"])
    runs = runs.assign(codecs=[c.get("codecs", "") for c in config],
                       route=[i.get("attention", "reference") for i in told], prefill=[i["prefill"] for i in told], dtype=[i["model"]["dtype"] for i in told],
                       same=[json.dumps({k: v for k, v in i.items() if k != "attention"}, sort_keys=True) for i in told])  # fmt: skip
    found = []
    for _, pair in runs.groupby(["same", "device", "codecs"]):
        if len(pair) == 2:
            by_route = committed.records(folder, pair, route="route").set_index("id").groupby("route")
            kept = pair.iloc[0][["task", "model", "quant", "bits", "prefill", "dtype", "device"]].to_dict() | {"commit": pair.set_index("route").at["fused", "commit"]}
            found.append({**kept, **compare(by_route.get_group("fused"), by_route.get_group("reference"))})
    return pd.DataFrame(found).sort_values(["dtype", "device", "task", "prefill", "quant", "bits"], ignore_index=True) if found else pd.DataFrame()


def compare(fused: pd.DataFrame, reference: pd.DataFrame) -> dict:
    """Records of two runs by example id. An example that one run lacks counts as a difference."""
    both = fused.join(reference, how="outer", lsuffix="_fused", rsuffix="_reference")
    loss = "loss" in fused
    values = [both[f"{'loss' if loss else 'score'}_{route}"] for route in ("fused", "reference")]
    largest = (values[0] - values[1]).abs().max(skipna=False)
    same = float("nan") if loss else float((both["prediction_fused"] == both["prediction_reference"]).mean())
    beside = {name: (both[f"{name}_fused"] - both[f"{name}_reference"]).abs().max(skipna=False) if loss else float("nan") for name in ("kl", "top1")}
    met = bool(abs((values[0] - values[1]).mean(skipna=False)) <= LOSS if loss else same >= SAME)
    return {"n": len(both), "equal": same, "fused": values[0].mean(), "reference": values[1].mean(), "largest": largest, **beside, "met": met}


def table(rows: pd.DataFrame) -> Table:
    made = Table(
        "Scores through the kernels beside scores through decoded keys and values, same examples, codecs and number type. "
        f"Answers: at least {SAME:.0%} must be equal in every character. "
        f"Loss, token by token: means may differ by {LOSS:g} nats per token; largest differences are of one example or window, KL and top-1 agreement against fp16. "
        "Where a prompt reads codes, rounding moves codes of later layers, so answers may differ although attention does not. "
        "So may long answers, whose own codes rounding moves. "
        "Scores in percent, losses in nats per token, means over examples. What is not listed has not been run on both routes with the same codecs."
    )
    for (dtype, device), part in rows.groupby(["dtype", "device"]):
        lines = [
            {"task": row.task, "prompt": PROMPTS[row.prefill], "method": style.label(row.quant), "bits": f"{row.bits:g}", "n": str(row.n), "equal answers": _told(row.equal, ".2%"),
             "reference": f"{row.reference:.4f}", "kernels": f"{row.fused:.4f}", "largest difference": f"{row.largest:.2g}",
             "of KL": _told(row.kl, ".2g"), "of top-1": _told(row.top1, ".2%"), "within tolerance": "yes" if row.met else "no", "kernels of": row.commit}
            for row in part.itertuples()
        ]  # fmt: skip
        made.add(f"{dtype}, " + ("torch definition of the kernels on a CPU" if device == "cpu" else f"kernels on {device}"), pd.DataFrame(lines))
    return made


def _told(value: float, how: str) -> str:
    return "" if pd.isna(value) else format(value, how)
