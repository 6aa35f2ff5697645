"""The ledger: verdicts follow from rows, missing rows are said, and every claim can be judged or says why not."""

from pathlib import Path

import pandas as pd
import pytest

from experiments import ledger

RESULTS = Path(__file__).resolve().parents[2] / "results"
FRAME = pd.DataFrame({"arm": ["a", "b", "b"], "value": [1.0, 2.0, 4.0]})


def verdict(monkeypatch, **claim):
    monkeypatch.setattr(ledger, "source", lambda name, results, model: FRAME)
    base = {"rows": "somewhere", "find": {"a": "arm == 'a'", "b": "arm == 'b'"}, "judge": "a < b", "show": "{a:.0f} and {b:.0f}"}
    return ledger.judge({**base, **claim}, RESULTS, "standin", {})


def test_verdicts(monkeypatch):
    held = verdict(monkeypatch)
    assert held["verdict"] == "reproduced in direction" and held["ours"] == "1 and 3" and "arm == 'b'" in held["evidence"]
    assert verdict(monkeypatch, judge="a > b")["verdict"] == "not reproduced"
    assert verdict(monkeypatch, kind="exact")["verdict"] == "reproduced"
    assert verdict(monkeypatch, kind="misleading")["verdict"] == "misleading"
    assert verdict(monkeypatch, kind="weights")["verdict"] == ledger.WEIGHTS


def test_missing_rows_are_said_and_never_judged(monkeypatch):
    assert verdict(monkeypatch, find={"a": "arm == 'nobody'"})["verdict"] == "no rows yet"
    assert verdict(monkeypatch, find={"a": "arm == 'nobody'"}, needs="weights")["verdict"] == ledger.WEIGHTS


def test_every_claim_is_judged_from_committed_rows():
    rows = ledger.rows(RESULTS)
    assert len(rows) >= 60 and set(rows["paper"]) == {"gsrq", "blockgtq"}
    known = {*sum(ledger.VERDICTS.values(), ()), ledger.WEIGHTS, "no rows yet"}
    assert set(rows["verdict"]) <= known
    assert rows[rows["verdict"] != ledger.WEIGHTS]["reported"].notna().all()
    assert (rows["verdict"] == "misleading").sum() >= 7 and not rows.duplicated(["place", "claim"]).any()


@pytest.mark.parametrize("claim", [c for c in ledger.claims(RESULTS) if c.get("rows")], ids=lambda c: f"{c['place']}: {c['claim']}"[:60])
def test_claims_are_complete(claim):
    assert set(claim["find"]) <= set(__import__("re").findall(r"[a-z_]\w*", claim["judge"] + claim["show"])), "a value is picked and not used"
