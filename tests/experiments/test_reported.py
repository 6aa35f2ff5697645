"""The papers' numbers and models: every model of both papers has a configuration, and overlays never touch the stand-in."""

from pathlib import Path

import pandas as pd
import yaml

from experiments import reported, scores

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"


def test_every_model_of_both_papers_is_configured_by_hub_id():
    for name in reported.MODELS:
        path = yaml.safe_load((CONF / f"{name}.yaml").read_text())["path"]
        assert path.count("/") == 1 and not path.startswith((".", "/")), path
    for paper in ("gsrq", "blockgtq"):
        published = set(reported.read(paper)["model"]) - {"", "N(0,I)", "lognormal-norms", "panel mean (10 models)"}
        assert not {m for m in published if m not in reported.MODELS.values()}


def test_nothing_is_overlaid_on_the_stand_in():
    table = reported.table("gsrq", "T3", metric="mean")
    assert len(table) == 8 and reported.on("standin", table).empty and len(reported.on("llama3_8b_instruct", table)) == 8


def test_subsets_become_columns():
    table = reported.table("gsrq", "Fig6a")
    assert set(table["tau"].dropna()) == {"0.01", "0.1", "1", "10", "100"}
    assert table[table["tau"] == "1"]["value"].item() == 12.498


def test_a_published_table_keeps_its_shape():
    wide = scores.published("blockgtq", "T5", index=["task"], columns="method_budget")
    assert isinstance(wide, pd.DataFrame) and wide.loc[wide["task"] == "qasper", "Block-GTQ K2V2"].item() == 45.26
