"""Means, standard errors and paired differences against formulas and simulations."""

import numpy as np
import pytest

from kvq.statistics import paired, summarize


def records(values: dict[str, list[float]], metric="score", shift=0.0):
    return [{"id": f"{s}/{i}", "subset": s, "metrics": {metric: v + shift}} for s, xs in values.items() for i, v in enumerate(xs)]


def cell(table, subset, column, metric="score"):
    rows = table[table.subset == subset]
    if "metric" in table:
        rows = rows[rows.metric == metric]
    assert len(rows) == 1
    return rows[column].iloc[0]


def test_mean_and_standard_error():
    table = summarize(records({"a": [1.0, 2.0, 6.0]}))
    assert list(table.columns) == ["subset", "metric", "value", "stderr", "n"]
    assert cell(table, "a", "value") == 3 and cell(table, "a", "n") == 3
    assert cell(table, "a", "stderr") == pytest.approx(np.std([1, 2, 6], ddof=1) / np.sqrt(3))
    assert set(table.subset) == {"a"}, "one subset needs no average"


def test_the_average_is_over_subsets_and_not_over_examples():
    table = summarize(records({"a": [0.0] * 9, "b": [1.0, 3.0]}))
    assert cell(table, "average", "value") == 1.0 and cell(table, "average", "n") == 11
    assert cell(table, "average", "stderr") == pytest.approx(cell(table, "b", "stderr") / 2)


def test_one_example_has_no_standard_error():
    assert np.isnan(cell(summarize(records({"a": [5.0]})), "a", "stderr"))


def test_only_metrics_that_all_subsets_have_are_averaged():
    mixed = records({"a": [1.0], "b": [2.0]}) + records({"a": [4.0]}, metric="extra")
    table = summarize(mixed)
    assert set(table[table.subset == "average"].metric) == {"score"}
    assert cell(table, "a", "value", "extra") == 4.0


def test_paired_differences():
    rng = np.random.default_rng(0)
    hard = {s: list(rng.normal(size=400) * 10) for s in "ab"}
    mine, theirs = records(hard), records(hard)
    for r in mine:
        r["metrics"]["score"] += rng.normal() * 0.1 - 1
    table = paired(mine, theirs, "score")
    for subset, n in (("a", 400), ("b", 400), ("average", 800)):
        assert cell(table, subset, "value") == pytest.approx(-1, abs=0.02) and cell(table, subset, "n") == n
    assert cell(table, "a", "stderr") == pytest.approx(0.1 / 20, rel=0.15)
    assert cell(table, "average", "stderr") == pytest.approx(0.1 / 20 / np.sqrt(2), rel=0.2)
    assert table.equals(paired(mine, theirs, "score")), "the bootstrap is seeded"


def test_the_same_scores_differ_by_nothing():
    table = paired(records({"a": [1.0, 5.0]}), records({"a": [1.0, 5.0]}), "score")
    assert cell(table, "a", "value") == 0.0 and cell(table, "a", "stderr") == 0.0


def test_the_order_of_records_does_not_matter():
    rng = np.random.default_rng(1)
    values = {"a": list(rng.normal(size=9))}
    mine, theirs = records(values, shift=1.0), records(values)
    assert paired(mine, theirs[::-1], "score").equals(paired(mine, theirs, "score"))


def test_other_examples_are_an_error():
    with pytest.raises(ValueError, match="other examples"):
        paired(records({"a": [1.0, 2.0]}), records({"a": [1.0]}), "score")
