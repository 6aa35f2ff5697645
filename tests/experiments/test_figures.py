"""Figures are pure functions of rows: same rows, same bytes; unknown methods get a colour; changed rows redraw."""

import json

import pandas as pd
import pytest

from experiments import choice, pareto, starts, style
from kvq import results


@pytest.fixture
def folder(tmp_path):
    common = {"model": "standin", "data": "embedded", "calib": "text", "encoded_tokens": 10, "stderr": 0.1, "n": 4, "commit": "", "dirty": False,
              "date": "", "device": "cpu", "torch": "", "transformers": ""}  # fmt: skip
    for quant in ("km", "gskm", "gsrq", "newcomer"):
        for bits in (0.5, 1.0, 2.0):
            for seed in (0, 1):
                for task, metric in (("perplexity", "loss"), ("niah", "score")):
                    config = json.dumps({"quant": {"key": {"cluster": {"start": "kmeans++" if quant == "km" else "spherical"}}}, "prefill": "quantized"})
                    values = {metric: 3 / bits + seed, f"{metric}_fp16": 1.0, f"{metric}_minus_fp16": 3 / bits}
                    run = results.run_id({"q": quant, "b": bits, "s": seed, "t": task})
                    rows = [{**common, "run": run, "quant": quant, "task": task, "bits": bits, "bits_stored": bits, "bits_total": bits + 1, "subset": "text",
                             "metric": name, "value": value, "seed": seed, "config": config} for name, value in values.items()]  # fmt: skip
                    results.write(rows, tmp_path / "runs" / f"{run}.parquet")
    return tmp_path


@pytest.mark.parametrize("module", [pareto, starts], ids=lambda m: m.__name__)
def test_same_rows_same_bytes(module, folder, tmp_path):
    style.setup()
    first = style.save(module.draw(module.rows(folder)), "a", tmp_path)
    second = style.save(module.draw(module.rows(folder)), "b", tmp_path)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_make_figures_redraws_what_changed(folder, capsys):
    from experiments.__main__ import main

    main(folder, ["pareto", "starts"])
    assert capsys.readouterr().out.count("drew") == 2
    main(folder, ["pareto", "starts"])
    assert capsys.readouterr().out.count("unchanged") == 2
    path = next((folder / "runs").glob("*.parquet"))
    frame = pd.read_parquet(path)
    results.write(frame.assign(value=frame.value + 1).to_dict("records"), path)
    main(folder, ["pareto"])
    assert "drew" in capsys.readouterr().out


def test_changed_options_are_not_the_shipped_method():
    base = {"quant": {"key": {"cluster": {"start": "random"}}}, "prefill": "quantized"}
    assert choice.changes("km", json.dumps(base)) == {"key.cluster.start": "random"}


def test_unknown_method_has_a_stable_colour():
    assert style.color("newcomer") == style.color("newcomer") != style.color("another")
