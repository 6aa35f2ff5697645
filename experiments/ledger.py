"""The ledger: what each paper claims, what was measured here, on which model, by which command, and whether it holds.

results/reported/claims.yaml holds the claims. A claim names the rows that decide it (an experiment's, a published table's, or plain
arithmetic), queries that pick values out of them, and a judgement over those values; nothing here knows a claim.
"""

import importlib
from pathlib import Path

import pandas as pd
import yaml

from experiments import reported
from experiments.tables import Table

CLAIMS = Path("reported") / "claims.yaml"
PAPERS = {"gsrq": "GSRQ (arXiv 2607.01065)", "blockgtq": "Block-GTQ (arXiv 2606.24033)"}
WEIGHTS = "not testable here: weights needed"
VERDICTS = {
    "direction": ("reproduced in direction", "not reproduced"),
    "exact": ("reproduced", "not reproduced"),
    "misleading": ("misleading", "not confirmed"),
    "ours": ("holds here", "does not hold here"),
}  # fmt: skip
"""Kind of claim to the verdict if its judgement holds and if not. direction: another model than the paper's; exact: the paper's own setting
(synthetic data, arithmetic); misleading: the judgement states our objection, not the claim; ours: a question the paper does not ask."""


def claims(results: Path) -> list[dict]:
    return yaml.safe_load((results / CLAIMS).read_text(encoding="utf-8"))


def source(name: str, results: Path, model: str) -> pd.DataFrame:
    """Rows by name: <experiment>, <experiment>.<function of its rows>, or reported.<paper>. Empty if there are none."""
    if name.startswith("reported."):
        return reported.read(name.partition(".")[2])
    module_name, _, through = name.partition(".")
    module = importlib.import_module(f"experiments.{module_name}")
    rows = module.rows(results, model)
    return getattr(module, through)(rows).reset_index() if through and len(rows) else rows


def pick(frame: pd.DataFrame, query: str, column: str) -> float:
    """Mean of `column` over the rows that a pandas query finds; NaN if none."""
    found = frame.query(query)[column] if len(frame) else pd.Series(dtype=float)
    return float(found.mean()) if len(found) else float("nan")


def judge(claim: dict, results: Path, model: str, cache: dict) -> dict:
    """One line of the ledger: ours, verdict, evidence."""
    if claim.get("kind") == "weights":
        return {"ours": "", "verdict": WEIGHTS, "evidence": ""}
    if claim.get("kind") == "tested":
        return {"ours": "held by a test", "verdict": "reproduced", "evidence": ""}
    values = {name: pd.eval(text) if isinstance(text, str) else text for name, text in claim.get("given", {}).items()}
    name = claim.get("rows")
    if name:
        if name not in cache:
            cache[name] = source(name, results, model)
        column = claim.get("column", "value")  # one for all values, or one per value
        values |= {key: pick(cache[name], query, column if isinstance(column, str) else column[key]) for key, query in claim["find"].items()}
    if any(v != v for v in values.values()):
        return {"ours": "", "verdict": WEIGHTS if claim.get("needs") == "weights" else "no rows yet", "evidence": ""}
    holds = bool(eval(claim["judge"], {"__builtins__": {"abs": abs, "max": max, "min": min}}, values))  # the file is ours, not a user's
    sums = "; ".join(f"{key} = {text}" for key, text in claim.get("given", {}).items())
    evidence = f"`{name}`: " + "; ".join(f"{key} = `{query}`" for key, query in claim["find"].items()) if name else sums
    return {"ours": claim["show"].format(**values), "verdict": VERDICTS[claim.get("kind", "direction")][not holds], "evidence": evidence}


def rows(results: Path = Path("results"), model: str = "standin") -> pd.DataFrame:
    """One line per claim."""
    cache: dict[str, pd.DataFrame] = {}
    lines = []
    for claim in claims(results):
        where = (
            "none"
            if claim.get("kind") == "tested"
            else "arithmetic"
            if not claim.get("rows")
            else "published numbers"
            if claim["rows"].startswith("reported.")
            else "synthetic"
            if claim["rows"].split(".")[0] in ("gsrq_gaussian", "gsrq_latency", "blockgtq_deployment")
            else model
        )
        experiment = (claim.get("rows") or "").partition(".")[0]
        command = claim.get("command") or ("" if experiment in ("", "reported") else f"python run.py experiment={experiment} size=gpu")
        found = judge(claim, results, model, cache)
        lines.append({"paper": claim["paper"], "place": claim["place"], "claim": claim["claim"], "reported": claim["reported"], **found,
                      "model": where if found["ours"] else "", "command": command, "note": claim.get("note", "")})  # fmt: skip
    return pd.DataFrame(lines)


def table(rows: pd.DataFrame) -> Table:
    """Verdicts counted; then what failed or misleads; then every claim, paper by paper."""
    counts = rows.groupby(["paper", "verdict"]).size().unstack("paper", fill_value=0).reset_index()
    made = Table(
        "What each paper claims and what this repository measured. *Reproduced in direction*: the order holds on the stand-in, a small model of our own; its numbers are "
        "not comparable with the papers'. *Reproduced*: in the paper's own setting. *Misleading*: true as printed, and the column beside says what it hides. "
        "*Ours*: a question that the paper does not ask."
    )
    made.add("Verdicts", counts.rename(columns=PAPERS))
    bad = rows[rows["verdict"].isin(["misleading", "not reproduced", "does not hold here"])]
    columns = {"place": "where", "claim": "claim", "reported": "reported", "ours": "measured here", "verdict": "verdict", "note": "what to know"}
    made.add("Read these first", bad[["paper", *columns]].rename(columns=columns))
    for paper, title in PAPERS.items():
        part = rows[rows["paper"] == paper]
        made.add(title, part.assign(command=[f"`{c}`" if c else "" for c in part["command"]])[[*columns, "model", "command", "evidence"]].rename(columns=columns))
    return made
