"""The estimate before a cell starts: weights and cache as they turn out to be, and a refusal with the figures where it cannot fit."""

import json
import re

import pytest

from kvq import estimate, runner, tiny
from kvq.errors import Refusal
from tests.kvq.test_runner import cell  # noqa: F401  fixture

QUANTS = {
    "fp16": [], "int4": [], "int8": [],
    "fp8": ["quant.key.granularity=token_head", "quant.value.granularity=token_head"], "tq_mse": ["bits=2"],
    "int4 with a window": ["quant.window=16", "quant.sink=4"], "kivi": ["bits=2", "quant.window=32"],
}  # fmt: skip


def estimated(cell, *overrides):  # noqa: F811
    return runner._estimate(runner.prepare(*cell.build(*overrides)))


@pytest.mark.parametrize("name,options", QUANTS.items(), ids=QUANTS)
def test_the_cache_is_as_large_as_it_turns_out(cell, tmp_path, name, options):  # noqa: F811
    words = [f"quant={name.split()[0]}", *options, "task.context=96", "task.limit=1", "model.dtype=bfloat16"]
    e = estimated(cell, *words)
    frame = cell(*words)
    usage = json.loads((tmp_path / "x" / "results" / "runs" / f"{frame.run[0]}.jsonl").read_text())["usage"]
    assert e.known and e.cache == usage["code_bytes"] + usage["exact_bytes"] and e.codebooks == usage["table_bytes"]
    assert e.length == 96 and e.decoded == 2 * 2 * 2 * 16 * 96 * 2


def test_weights_are_counted_without_loading(cell):  # noqa: F811
    model, _ = tiny.load("llama", "float32", "cpu")
    assert estimated(cell, "quant=int4", "model.dtype=float32").weights == sum(p.numel() * 4 for p in model.parameters())
    assert estimated(cell, "quant=int4", "model.dtype=bfloat16").weights == sum(p.numel() * 2 for p in model.parameters())


def test_learned_codes_are_estimated_by_their_label_and_longer_calibrations_take_more(cell):  # noqa: F811
    e = estimated(cell, "quant=gsrq", "bits=2", "task.context=96")
    assert not e.known and e.bits == 2 and e.cache == 2 * 2 * 2 * 16 * 96 * 2 // 8
    assert estimated(cell, "quant=gsrq", "bits=2", "calib.samples=4").calibration > e.calibration > estimated(cell, "quant=int4").calibration


def test_a_dry_run_says_what_is_needed_and_does_nothing(cell, tmp_path, capsys):  # noqa: F811
    assert cell("quant=int4", "dry_run=true") is None
    said = " ".join(capsys.readouterr().out.split())
    for part in (r"run \w{8}: tiny int4 4 bits perplexity", r"weights \d\.\d MB", r"cache of 48 tokens \d+ KB at 6.000 bits", r"calibration \d", r"about \S+ s per sequence"):
        assert re.search(part, said), said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dry", ["true", "false"])
def test_what_cannot_fit_is_refused_with_the_figure(cell, monkeypatch, tmp_path, dry):  # noqa: F811
    monkeypatch.setattr(estimate, "_memory", lambda *_: (10_000, "this machine"))
    with pytest.raises(Refusal, match=r"needs at least \d+\.\d GB \(weights \d+\.\d, cache of 48 tokens .* this machine has 0\.0; use"):
        cell("quant=int4", f"dry_run={dry}")
    assert not (tmp_path / "x").exists()


def test_a_model_of_hundreds_of_gigabytes_is_refused_from_its_config(cell, tmp_path):  # noqa: F811
    model, tokenizer = tiny.load("llama", "float32", "cpu")
    tokenizer.save_pretrained(tmp_path / "huge")
    large = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128}
    (tmp_path / "huge" / "config.json").write_text(json.dumps({**model.config.to_dict(), **large, "vocab_size": 128256}))
    with pytest.raises(Refusal, match=r"needs at least (1[45]|7)\d\d\.\d GB \(weights"):
        cell("model=local", f"model.path={tmp_path}/huge", "quant=int4", "task.context=4096")


def test_a_batch_that_does_not_fit_is_said_not_refused(cell, monkeypatch, capsys):  # noqa: F811
    e = estimated(cell, "quant=int4")
    monkeypatch.setattr(estimate, "_memory", lambda *_: (e.least + 100, "this machine"))
    cell("quant=int4", "dry_run=true", "task.batch_size=64")
    assert "does not fit with task.batch_size=64, lower it" in " ".join(capsys.readouterr().out.split())
