"""What the committed rows of the stand-in say: more bits never cost, in the loss nor, beyond the noise, in any score."""

import itertools
import json
from pathlib import Path

import pytest

from kvq import results

ROOT = Path(__file__).resolve().parents[2]
MAIN = {"loss": -1, "score": 1}
"""Main metric to its direction."""
WHOLE = ("average", "text", "choices", "arithmetic", "gsm8k")
"""The subset that stands for a run."""
ASIDE = {*results.HOW, "content"}
"""Task options that do not set sweeps apart: how it is computed, and a hash of the task that also moves with the names of its examples."""
SUITES = ("perplexity", "longbench", "niah", "choices", "aime")


def sweeps():
    """{(task, quantizer, all else that was computed): {bits: (value, stderr)}} of committed runs, main metric only."""
    rows = results.load(ROOT / "results", model="standin", metric=list(MAIN), subset=list(WHOLE))
    found = {}
    for row in rows.itertuples():
        identity = json.loads(row.config)["identity"]
        identity["quant"] = {k: v for k, v in identity["quant"].items() if k in ("name", "sink", "window")}
        identity["task"] = {k: v for k, v in identity["task"].items() if k not in ASIDE}
        key = (row.task, row.quant, row.metric, json.dumps(identity, sort_keys=True))
        found.setdefault(key, {})[row.bits] = (MAIN[row.metric] * row.value, row.stderr)
    return {key: budgets for key, budgets in found.items() if {1.0, 2.0, 4.0} <= budgets.keys()}


SWEEPS = sweeps()


def test_there_are_sweeps_to_look_at():
    assert set(itertools.product(SUITES, ("gsrq", "blockgtq", "kivi"))) <= {(task, quant) for task, quant, _, _ in SWEEPS}
    assert len(SWEEPS) >= 44


@pytest.mark.parametrize("key", SWEEPS, ids=lambda key: f"{key[0]}-{key[1]}")
def test_four_bits_beat_two_and_two_beat_one(key):
    budgets = SWEEPS[key]
    for more, fewer in itertools.pairwise((4.0, 2.0, 1.0)):
        (high, a), (low, b) = budgets[more], budgets[fewer]
        if key[2] == "loss":
            assert high > low, (more, fewer)
        else:
            assert high - low >= -2 * (a**2 + b**2) ** 0.5, (more, fewer)
    (best, a), (worst, b) = budgets[4.0], budgets[1.0]
    saturated = key[2] == "score" and worst == 100.0  # full marks at one bit: a suite too easy to tell budgets apart, and none was lost
    assert best - worst > 0 or saturated, "four bits and one bit must differ"
