"""Figures are pure functions of rows: same rows, same bytes; changed rows redraw; other sizes and other options stay out."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments import budget, choice, committed, gsrq_perplexity, pareto, scores, style, suites
from kvq import results

CONFIG = {"quant": {"key": {"bits": 1, "cluster": {"start": "spherical"}}, "value": {"bits": 1}}, "prefill": "quantized", "task": {"limit": 4}, "calib": {"samples": 8}}


def write(folder, quant, bits, seed, value, task="perplexity", config=CONFIG, calib="text", date=""):
    metric = "loss" if task == "perplexity" else "score"
    common = {"model": "standin", "data": "embedded", "calib": calib, "encoded_tokens": 10, "stderr": 0.1, "n": 4, "commit": "", "dirty": False,
              "date": date, "device": "cpu", "torch": "", "transformers": ""}  # fmt: skip
    told = {"model": {}, "seed": seed, "identity": {"model": {"dtype": "bfloat16"}}}
    config = {**told, **config, "quant": {**config["quant"], "key": {**config["quant"]["key"], "bits": bits}, "value": {"bits": bits}}}
    values = {metric: value + 1, f"{metric}_fp16": 1.0, f"{metric}_minus_fp16": value, "kl": value}
    run = results.run_id({"q": quant, "b": bits, "s": seed, "t": task, "c": config})
    rows = [{**common, "run": run, "quant": quant, "task": task, "bits": bits, "bits_stored": bits, "bits_total": bits + 1, "subset": "text", "metric": name,
             "value": v, "seed": seed, "config": json.dumps(config)} for name, v in values.items()]  # fmt: skip
    results.write(rows, folder / "runs" / f"{run}.parquet")
    return run


@pytest.fixture
def folder(tmp_path):
    for quant in ("km", "gskm", "gsrq", "newcomer"):
        for bits in (0.5, 1.0, 2.0):
            for seed in (0, 1):
                for task in ("perplexity", "niah"):
                    write(tmp_path, quant, bits, seed, 3 / bits + seed / 10, task)
    return tmp_path


@pytest.mark.parametrize("module", [pareto, gsrq_perplexity], ids=lambda m: m.__name__)
def test_same_rows_same_bytes(module, folder, tmp_path):
    style.setup()
    first = style.save(module.draw(module.rows(folder)), "a", tmp_path)
    second = style.save(module.draw(module.rows(folder)), "b", tmp_path)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_make_figures_redraws_what_changed(folder, capsys):
    from experiments.__main__ import main

    main(folder, ["pareto", "gsrq_perplexity"])
    assert capsys.readouterr().out.count("drew") == 2
    main(folder, ["pareto", "gsrq_perplexity"])
    assert capsys.readouterr().out.count("unchanged") == 2
    write(folder, "newcomer", 1.0, 2, 9.0)  # a method that gsrq_perplexity does not show
    main(folder, ["pareto", "gsrq_perplexity"])
    said = capsys.readouterr().out
    assert "pareto: drew" in said and "gsrq_perplexity: unchanged" in said
    assert "| newcomer |" in (folder / "tables" / "pareto.md").read_text()
    assert "newcomer" in (folder / "tables" / "pareto.tex").read_text()


def test_a_mistyped_experiment_is_refused():
    run = subprocess.run([sys.executable, "-m", "experiments", "pareto", "beem"], cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True)
    assert run.returncode == 2 and "there is no experiment beem; choose from: " in run.stderr and not run.stdout


def test_a_figure_depends_on_the_modules_that_it_uses():
    from experiments import beam, blockgtq_deployment
    from experiments.__main__ import sources

    names = {source.rpartition("/")[2] for source in sources(blockgtq_deployment)}
    assert {"blockgtq_deployment.py", "latency.py", "style.py", "tables.py"} <= names and "latency.py" not in {s.rpartition("/")[2] for s in sources(beam)}


def test_only_the_largest_setting_is_compared(folder):
    other = {**CONFIG, "calib": {"samples": 64}}
    stray = write(folder, "gsrq", 1.0, 0, 0.001, config=other)
    kept = committed.one_setting(committed.load(folder, task="perplexity"))
    assert stray not in set(kept["run"]) and kept["run"].nunique() == 24


def test_of_sizes_with_equally_many_runs_the_longest_calibration_is_drawn(tmp_path):
    """Widths were once drawn from 128 tokens of calibration, because that sorts before 2,048."""
    runs = {length: write(tmp_path, "blockgtq", 3, 0, 0.1, config={**CONFIG, "calib": {"samples": 1, "length": length}}) for length in (128, 2048, 512)}
    assert set(committed.one_setting(committed.load(tmp_path))["run"]) == {runs[2048]}
    assert set(committed.one_calibration(committed.load(tmp_path))["run"]) == {runs[2048]}


def test_changed_options_are_not_the_shipped_method(folder):
    changed = {**CONFIG, "quant": {"key": {"cluster": {"start": "random"}}, "value": {}}}
    assert choice.changes("km", json.dumps(changed)) == {"key.cluster.start": "random"}
    assert choice.changes("gsrq", json.dumps({"quant": {"key": {"codebook": "float8", "code_bits": 9}}})) == {"key.codebook": "float8"}, "an option that the YAML leaves out"
    assert choice.changes("a method that is gone", json.dumps(changed)) == {}
    stray = write(folder, "gsrq", 1.0, 0, 0.001, config=changed)
    assert stray not in set(committed.shipped(committed.load(folder))["run"])
    assert stray in set(committed.shipped(committed.load(folder), ("key.cluster.start",))["run"])


def test_scores_hold_the_paired_difference_and_its_reference(folder):
    rows = scores.gather(folder, "standin", {"perplexity": "loss_minus_fp16"}, ("gsrq",))
    assert len(rows) == 6 and set(rows["fp16"]) == {1.0} and rows[rows["bits"] == 2]["value"].tolist() == [1.5, 1.6]


def test_unknown_method_has_a_stable_colour():
    assert style.color("newcomer") == style.color("newcomer") != style.color("another")


def test_names_beside_lines_do_not_overlap():
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(3.4, 2.5))
    axis.set_ylim(0, 1)
    style.name_ends(axis, [(0.5, "a", "black"), (0.5, "b", "black"), (0.51, "c", "black"), (1.0, "d", "black")])
    heights = sorted(text.xy[1] for text in axis.texts)
    assert min(b - a for a, b in zip(heights, heights[1:])) > 0.03 and heights[-1] <= 1.0001
    plt.close(figure)


def test_drawing_needs_no_torch(folder):
    code = f"""
import sys; sys.modules['torch'] = None
from pathlib import Path
from experiments.__main__ import main, modules
assert len(modules(None)) >= 30
main(Path({str(folder)!r}), ['pareto'])
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


def test_latex_escapes_and_markdown_agree():
    from experiments.tables import Table

    made = Table("Caption.").add("Part", pd.DataFrame([{"a_b": "5 % ± 1", "c": 0.123456}]))
    assert "| 5 % ± 1 | 0.1235 |" in made.markdown() and "a\\_b & c" in made.latex() and "5 \\% $\\pm$ 1 & 0.1235 \\\\" in made.latex()


def suite(folder, calib, scores_by_bits, task="niah"):
    """GSRQ at 4, 2 and 1 bits: loss rising as bits fall, and the given scores."""
    config = {**CONFIG, "calib": {"samples": calib, "length": 64, "source": "text"}}
    for bits, score in scores_by_bits.items():
        write(folder, "gsrq", bits, 0, 1 / bits, "perplexity", config)
        write(folder, "gsrq", bits, 0, score - 1, task, config)  # `write` adds one to the score


@pytest.mark.parametrize(
    ("found", "follows"),
    [({4: 90, 2: 80, 1: 10}, "yes"), ({4: 80, 2: 90, 1: 10}, "no"), ({4: 90, 2: 90.1, 1: 10}, "within error"), ({4: 90, 2: 90, 1: 10}, "within error")],
)
def test_the_order_of_scores_is_judged_against_that_of_losses(found, follows, tmp_path):
    suite(tmp_path, 8, found)
    assert suites.order(suites.rows(tmp_path))["follows"].tolist() == [follows]
    assert f"| {follows} |" in suites.table(suites.rows(tmp_path)).markdown()


def test_a_suite_table_has_one_calibration_and_says_which(tmp_path, caplog):
    suite(tmp_path, 8, {4: 90, 2: 80, 1: 10})
    suite(tmp_path, 64, {4: 99})
    made = suites.rows(tmp_path)
    assert set(made["calibration"]) == {"8 x 64 tokens of text"} and 99 not in set(made["value"])
    assert "Calibration: 8 x 64 tokens of text." in suites.table(made).caption and "Runs are in bfloat16." in suites.table(made).caption
    committed.one_setting(committed.load(tmp_path, task="niah"))
    assert "niah: 1 runs of another size stay out: calib.samples=64 (here 8)" in caplog.text


def test_budget_tells_starts_apart_and_counts_seeds(tmp_path):
    for start in ("random", "kmeans++"):
        config = {**CONFIG, "quant": {"key": {"cluster": {"start": start}}, "value": {}}, "calib": {"samples": 8, "length": 64, "source": "text"}}
        for bits in (1, 2):
            for seed in (0, 1, 2):
                write(tmp_path, "km", bits, seed, (3 if start == "random" else 2) / bits, config={**config, "seed": seed})
    made = budget.rows(tmp_path)
    assert made.groupby("arm").size().to_dict() == {"km random": 6, "km kmeans++": 6}
    assert "| k-means++ | 2.0000 ± 0.0000 (3) | 1.0000 ± 0.0000 (3) |" in budget.table(made).markdown()
    assert budget.rises(made)["rises"].all()
    assert not budget.rises(made.assign(value=-made["value"]))["rises"].any()


def test_a_streamed_run_stands_beside_the_same_windows_in_one_pass(folder):
    assert "token by token" not in pareto.table(pareto.rows(folder)).markdown()
    for limit, step, value in ((4, True, 0.25), (4, False, 0.5), (8, True, 0.125)):
        write(folder, "kivi", 2, 0, value, config={**CONFIG, "quant": {"key": {}, "value": {}}, "task": {"limit": limit, "streamed": step}}, calib="none")
    made = pareto.table(pareto.rows(folder)).markdown()
    assert "token by token" in made and "| KIVI (window 128) | 2/2 | 2.000 | 4 | 0.500 ± 0.100 | 0.250 ± 0.100 |" in made


def test_of_several_runs_of_one_cell_the_latest_is_read(tmp_path):
    """A run's name changes with its number type and with new options; its rows must not be taken for another seed's."""
    old = write(tmp_path, "gsrq", 2, 0, 0.1, config={**CONFIG, "model": {"dtype": "float32"}}, date="2026-01-01T00:00:00Z")
    new = write(tmp_path, "gsrq", 2, 0, 0.2, config={**CONFIG, "model": {"dtype": "bfloat16"}, "task": {"limit": 4, "later": None}}, date="2026-01-02T00:00:00Z")
    other = write(tmp_path, "gsrq", 2, 1, 0.3, date="2026-01-01T00:00:00Z")
    assert old != new and set(committed.load(tmp_path)["run"]) == {new, other}


def test_a_table_of_several_tasks_gives_each_its_own_all_in_bits_and_seeds(folder):
    """All-in bits fall with the length of a run; their mean over tasks once changed when a row of another task arrived."""
    rows = scores.gather(folder, "standin", {"perplexity": "loss_minus_fp16", "niah": "score"}, ("gsrq",))
    rows.loc[rows["task"] == "niah", "bits_total"] += 100
    rows = rows[~((rows["task"] == "niah") & (rows["bits"] == 2)) & ~((rows["task"] == "niah") & (rows["seed"] == 1) & (rows["bits"] == 1))]
    table = scores.tabulate(rows, "Scores.", [("perplexity", "loss"), ("niah", "needles")], 1)
    one = table.parts[0][1].set_index("bits K/V").loc["1/1"]
    assert (one["all-in, loss"], one["all-in, needles"], one["loss"], one["needles"]) == ("2.00", "102.00", "3.0 ± 0.1 (2)", "4.0 ± 0.1")
    assert "needles: GSRQ at 2." in table.caption
    assert "all-in" in scores.tabulate(rows, "Scores.", [("perplexity", "loss")]).parts[0][1].columns
    none = scores.tabulate(rows, "Scores.", [("niah", "needles"), ("fewshot", "seven tasks")]).parts[0][1]
    assert set(none["seven tasks"]) == {""}, "fp16 as well"


def test_a_line_does_not_cross_a_missing_cell(folder):
    import matplotlib.pyplot as plt

    rows = scores.gather(folder, "standin", {"perplexity": "loss_minus_fp16", "niah": "score"}, ("gsrq",))
    rows = rows[~((rows["task"] == "niah") & (rows["bits"] == 1))]
    figure, axis = plt.subplots()
    scores.panel(axis, rows[rows["task"] == "niah"], names=False, every=rows)
    heights = axis.containers[0][0].get_ydata()
    assert [value != value for value in heights] == [False, True, False]
    plt.close(figure)


def test_a_share_is_given_of_a_gap_only():
    from experiments import start_effect

    arms = {"km kmeans++": (3.0, 3.1, 3.2), "km spherical": (1.9, 2.0, 2.1), "gskm spherical": (2.0, 2.1, 2.2), "gskm kmeans++": (3.0, 3.1, 3.3)}
    rows = pd.DataFrame([{"where": where, "arm": arm, "stage": stage, "split": "held-out", "seed": seed, "value": sign * value[seed]}
                         for where, stage, sign in (("keys", 16, 1), ("loss", 1.0, -1), ("loss", 2.0, 1)) for arm, value in arms.items() for seed in range(3)])  # fmt: skip
    told = start_effect.verdict(rows).set_index(["where", "stage or bits"])["closed by the start alone"]
    assert told["keys", 16] == "110 ± 0 %" and told["loss", 2.0] == "110 ± 0 %" and told["loss", 1.0] == "no gap"
    said = start_effect.answer(rows)
    assert "closes 110 ± 0 % of the gap of keys" in said and "k-means++ is ahead of GSKM at 1 bits; GSKM is ahead of k-means++ at 2 bits" in said
