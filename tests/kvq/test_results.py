"""Result files: named by what was computed, whole or absent, and refused when damaged."""

import os

import numpy as np
import pandas as pd
import pytest

from kvq import results
from kvq.errors import Refusal


def row(**changes) -> dict:
    base = {
        "run": "0a1b2c3d", "model": "tiny", "quant": "int4", "task": "perplexity", "data": "embedded", "calib": "none",
        "bits": 4, "bits_stored": 4.5, "bits_total": 4.6, "encoded_tokens": 10, "subset": "text", "metric": "loss",
        "value": 2, "stderr": 0.1, "n": 3, "seed": 0, "config": "{}", **results.provenance("cpu"),
    }  # fmt: skip
    return {**base, **changes}


def test_the_run_id_is_of_values_and_not_of_their_spelling():
    one = results.run_id({"quant": {"bits": 1, "sink": 0}, "seed": 0, "subsets": ("a", "b"), "limit": None})
    assert one == results.run_id({"seed": 0.0, "subsets": ["a", "b"], "quant": {"sink": 0.0, "bits": 1.0}, "limit": None})
    assert len(one) == 8 and int(one, 16) >= 0
    others = [{"quant": {"bits": 2, "sink": 0}, "seed": 0}, {"quant": {"bits": 1, "sink": False}, "seed": 0}, {"quant": {"bits": "1", "sink": 0}, "seed": 0}]
    assert len({one, *map(results.run_id, others)}) == 4


def test_rows_come_back_as_written(tmp_path):
    path = tmp_path / "runs" / "x.parquet"
    frame = results.write([row(), row(metric="kl", value=0.5)], path)
    assert list(frame.columns) == list(results.COLUMNS) and frame.value.dtype == np.float64 and frame.n.dtype == np.int64
    pd.testing.assert_frame_equal(results.read(path), frame, check_dtype=False)
    assert [p.name for p in path.parent.iterdir()] == ["x.parquet"]


@pytest.mark.parametrize(
    "changes,match",
    [
        ({"value": float("nan")}, "value is not finite for metric loss of subset text"),
        ({"bits_total": float("inf")}, "bits_total is not finite"),
        ({"bits_stored": float("nan")}, "bits_stored is not finite"),
        ({"encoded_tokens": 0}, "No token was encoded under quant=int4"),
        ({"colour": "red"}, r"unknown \['colour'\]"),
    ],
    ids=str,
)
def test_a_bad_row_is_not_written(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        results.write([row(), row(**changes)], tmp_path / "x.parquet")
    assert not list(tmp_path.iterdir())


def test_a_missing_column_is_named(tmp_path):
    short = row()
    del short["seed"]
    with pytest.raises(ValueError, match=r"missing \['seed'\]"):
        results.write([short], tmp_path / "x.parquet")


def test_fp16_may_hold_everything_exactly(tmp_path):
    results.write([row(quant="fp16", encoded_tokens=0)], tmp_path / "x.parquet")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_text("old")

    def save(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.replace(path, save)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.parquet"]


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "runs" / "x.parquet"
    results.write([row()], path)
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"not parquet at all"):
        path.write_bytes(damage)
        with pytest.raises(Refusal, match=r"x\.parquet is not a readable result file.*delete it"):
            results.load(tmp_path)
    pd.DataFrame({"a": [1]}).to_parquet(path)
    with pytest.raises(Refusal, match=r"x\.parquet has other columns"):
        results.read(path)


def test_load_filters_by_columns(tmp_path):
    assert results.load(tmp_path).empty and list(results.load(tmp_path).columns) == list(results.COLUMNS)
    for i, quant in enumerate(("int4", "int8", "km")):
        results.write([row(quant=quant, bits=i + 1), row(quant=quant, metric="kl")], tmp_path / "runs" / f"{quant}.parquet")
    assert len(results.load(tmp_path)) == 6
    assert set(results.load(tmp_path, quant=["km", "int8"], metric="kl").quant) == {"km", "int8"}
    assert len(results.load(tmp_path, bits=2)) == 1


def test_provenance_says_where_a_row_comes_from():
    found = results.provenance("cpu")
    assert set(found) == {"commit", "dirty", "date", "device", "torch", "transformers"}
    assert isinstance(found["dirty"], bool) and found["date"].endswith("Z") and found["torch"]
