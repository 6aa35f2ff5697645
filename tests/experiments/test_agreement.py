"""Both routes are run, the fused one through the kernels' entry; their pairs are compared example by example and judged by stated tolerances."""

import json

import pytest

from experiments import agreement
from experiments.__main__ import main
from kernels import backend, lookup_pair, paged
from kvq import predictions, results
from tests.experiments.test_experiments import composed


def run(folder, quant, attention, task, *words):
    from kvq import runner

    name = "agreement_loss" if task == "perplexity" else "agreement"
    asked = [f"experiment={name}", "size=fast", f"quant={quant}", f"attention={attention}", f"task={task}", "model.device=cpu", *words]
    return runner.run(*composed([*asked, f"results={folder}/agreement", f"outputs={folder}/outputs"]))


@pytest.mark.parametrize(("quant", "kernel"), [("gsrq", lookup_pair.Pair), ("tq_mse", paged.PagedAttention)])
@pytest.mark.parametrize(("task", "words"), [("perplexity", ["task.context=12"]), ("niah", ["task.context=160", "task.subsets=[single]", "task.max_new_tokens=2"])])
def test_both_routes_say_the_same(quant, kernel, task, words, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "INTERPRET", backend.INTERPRET and task == "niah")  # losses by the torch definition, a second a token less
    calls, real = [], kernel.attend
    monkeypatch.setattr(kernel, "attend", lambda self, *given, **options: calls.append(1) or real(self, *given, **options))
    run(tmp_path, quant, "reference", task, *words)
    assert not calls
    fused = run(tmp_path, quant, "fused", task, *words)
    assert calls and json.loads(fused["config"].iloc[0])["identity"]["attention"] == "fused"
    found = agreement.rows(tmp_path, "tiny")
    assert len(found) == 1 and found["met"].all() and (found["largest"] <= 1e-4).all() and (found["equal"].isna() | (found["equal"] == 1)).all()
    assert found["kl"].isna().all() or (found["kl"] > 0).all(), "the same number to the last bit: one route was run twice"


def write(folder, attention, answers, losses=None, dtype="float32", codecs="a"):
    """One run of 100 examples; answers: predictions where they are not 'a', by example."""
    task = "niah" if losses is None else "perplexity"
    identity = {"prefill": "exact", "model": {"dtype": dtype}, "task": {"name": task}, **({"attention": "fused"} if attention == "fused" else {})}
    name, metric = results.run_id(identity), "score" if losses is None else "loss"
    common = {"run": name, "model": "standin", "quant": "kivi", "task": task, "data": "embedded", "calib": "none", "bits": 2, "bits_stored": 2, "bits_total": 3,
              "encoded_tokens": 9, "subset": "s", "metric": metric, "value": 1.0, "stderr": 0.0, "n": 100, "seed": 0,
              "config": json.dumps({"identity": identity, "codecs": codecs}),
              "commit": "", "dirty": False, "date": "", "device": "cpu", "torch": "", "transformers": ""}  # fmt: skip
    results.write([common], folder / "agreement" / "runs" / f"{name}.parquet")
    records = []
    for i in range(100):
        scores = {"score": 0.0 if i in answers else 100.0} if losses is None else {"loss": losses.get(i, 1.0), "kl": 0.1, "top1": 0.5}
        records.append({"id": f"s/{i}", "subset": "s", "metrics": scores, "prediction": answers.get(i, "a") if losses is None else None, "usage": {}})
    (folder / "agreement" / "runs" / f"{name}.jsonl").write_text("".join(map(predictions.line, records)))


@pytest.mark.parametrize(("answers", "met"), [({}, True), ({3: "b"}, True), ({3: "b", 4: "c"}, False)])
def test_one_answer_in_a_hundred_may_differ(answers, met, tmp_path):
    write(tmp_path, "reference", {})
    write(tmp_path, "fused", answers)
    (row,) = agreement.rows(tmp_path).itertuples()
    assert (row.n, row.equal, row.met) == (100, 1 - len(answers) / 100, met)
    assert row.largest == (100.0 if answers else 0.0) and row.reference - row.fused == pytest.approx(len(answers))


def test_runs_with_other_codecs_are_no_pair(tmp_path):
    write(tmp_path, "reference", {})
    write(tmp_path, "fused", {}, codecs="b")
    assert agreement.rows(tmp_path).empty


def test_the_mean_loss_is_judged_and_the_largest_difference_told(tmp_path):
    for dtype, loss in (("float32", 1.0 + 90 * agreement.LOSS), ("bfloat16", 1.0 - 110 * agreement.LOSS)):
        write(tmp_path, "reference", {}, {}, dtype)
        write(tmp_path, "fused", {}, {7: loss}, dtype)
    found = agreement.rows(tmp_path).set_index("dtype")
    assert found["met"].to_dict() == {"float32": True, "bfloat16": False} and found["equal"].isna().all()
    assert found["largest"].to_dict() == pytest.approx({"float32": 90 * agreement.LOSS, "bfloat16": 110 * agreement.LOSS})
    text = agreement.table(agreement.rows(tmp_path).reset_index()).markdown()
    assert "torch definition of the kernels on a CPU" in text and "| no |" in text and "| yes |" in text


def test_without_a_pair_one_sentence_says_so(tmp_path, capsys):
    write(tmp_path, "fused", {})
    assert main(tmp_path, ["agreement"]) == 0
    assert capsys.readouterr().out.strip().splitlines() == [f"agreement: no rows in {tmp_path} yet (python run.py experiment=agreement)"]
    assert not (tmp_path / "tables").exists()
