"""Means, weights, clusters, paired differences, and the flag for a reference that has nothing to lose."""

import numpy as np
import pytest

from kvq.statistics import paired, summarize, weakness


def record(i, value, subset="a", **more):
    return {"id": f"{subset}/{i}", "subset": subset, "metrics": {"score": value}, **more}


def test_plain_mean_and_standard_error():
    row = summarize([record(i, v) for i, v in enumerate((1.0, 2.0, 6.0))]).iloc[0]
    assert row.value == 3 and row.n == 3 and row.stderr == pytest.approx(np.std([1, 2, 6], ddof=1) / np.sqrt(3))
    assert np.isnan(summarize([record(0, 1.0)]).iloc[0].stderr)


def test_weights_give_the_mean_over_tokens():
    rows = [record(0, 2.0, weight=300), record(1, 5.0, weight=100)]
    assert summarize(rows).iloc[0].value == pytest.approx(2.75)
    halves = [record(0, 2.0, weight=150), record(1, 5.0, weight=50)]
    assert summarize(rows).stderr.iloc[0] == pytest.approx(summarize(halves).stderr.iloc[0])  # only ratios of weights count
    assert paired(rows, [record(0, 1.0), record(1, 1.0)], "score").value.iloc[0] == pytest.approx(1.75)


def test_repeats_count_as_one_problem():
    rows = [record(f"{p}/{r}", v, cluster=str(p)) for p, values in enumerate(((0, 100, 0, 100), (100, 100, 100, 100), (0, 0, 0, 0))) for r, v in enumerate(values)]
    row = summarize(rows).iloc[0]
    assert row.n == 3 and row.value == pytest.approx(50) and row.stderr == pytest.approx(np.std([50, 100, 0], ddof=1) / np.sqrt(3))
    difference = paired(rows, [{**r, "metrics": {"score": 0.0}} for r in rows], "score").iloc[0]
    assert difference.n == 3 and difference.value == pytest.approx(50) and 15 < difference.stderr < 30


def test_paired_refuses_other_examples():
    with pytest.raises(ValueError, match="other examples"):
        paired([record(0, 1.0)], [record(1, 1.0)], "score")


@pytest.mark.parametrize(
    "values, chance, perfect, weak",
    [
        ([0.0] * 20, 0, 100, 1),  # scores nothing
        ([0.0] * 19 + [100.0], 0, 100, 1),  # one lucky hit: within two standard errors
        ([0.0, 100.0] * 40, 0, 100, 0),
        ([0.0, 100.0, 0.0, 0.0] * 40, 25, 100, 1),  # four choices, a quarter right
        ([100.0] * 20, 25, 100, 0),
        ([8.9, 9.1] * 10, 9.0, 0, 1),  # a loss at ln(vocabulary)
        ([3.1, 3.3] * 10, 9.0, 0, 0),
        ([8.9], 9.0, 0, 1),  # one window: no standard error, still near guessing
        ([3.1], 9.0, 0, 0),
    ],
)
def test_weak_references_are_flagged(values, chance, perfect, weak):
    table = weakness([record(i, v, chance=chance) for i, v in enumerate(values)], "score", perfect)
    assert table.value.tolist() == [weak]


def test_weakness_is_per_subset_and_on_average():
    rows = [record(i, 0.0, "a") for i in range(9)] + [record(i, 90.0, "b") for i in range(9)]
    assert weakness(rows, "score", 100.0).set_index("subset").value.to_dict() == {"a": 1, "b": 0, "average": 0}
