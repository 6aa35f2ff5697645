"""The Gaussian figure: its rows are computed as documented, drawing needs no torch, and the committed rows respect the bound."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments import gsrq_gaussian

RESULTS = Path(__file__).resolve().parents[2] / "results"


def test_rows_of_one_small_case():
    frame = gsrq_gaussian.compute({"D sweep, N=10k": [(8, 16, 400)], "K sweep, N=10k": [(8, 16, 400)]}, ("km_random", "gskm"), seeds=(0,), workers=1)
    assert list(frame.columns) == ["experiment", "D", "K", "N", "arm", "split", "metric", "value", "seed", "seconds"]
    assert len(frame) == 2 * 2 * 2 * 4 and frame["value"].notna().all()
    mse = frame[frame["metric"] == "mse"].groupby("split")["value"].mean()
    assert gsrq_gaussian.bound(8, 16) < mse["held-out"] < 1 and mse["train"] < mse["held-out"]


def test_the_paper_is_overlaid_from_its_table():
    paper = gsrq_gaussian.rows(RESULTS)
    paper = paper[(paper["arm"] == "paper GSKM") & (paper["D"] == 256) & (paper["K"] == 2048) & (paper["metric"] == "mse")]
    assert paper["value"].tolist() == [0.702, 0.702]


def test_committed_rows_respect_the_bound_on_new_vectors():
    ours = gsrq_gaussian.rows(RESULTS).query("metric == 'mse' and split == 'held-out'")
    assert set(ours["arm"]) == set(gsrq_gaussian.ARMS) and ours.groupby(["arm", "D", "K", "N"])["seed"].nunique().min() == 3
    assert (ours["value"] > gsrq_gaussian.bound(ours["D"], ours["K"]) - 0.001).all()
    rich = ours[(ours["experiment"] == "D sweep, N=200K") & (ours["D"] == 128)].groupby("arm")["value"].mean()
    assert rich["gskm"] == pytest.approx(0.940, abs=0.002)


def test_drawing_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from experiments import gsrq_gaussian as g\n"
        f"figure = g.draw(g.rows(Path({str(RESULTS)!r})))\n"
        "assert len(figure.axes) == 6"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=RESULTS.parent)
