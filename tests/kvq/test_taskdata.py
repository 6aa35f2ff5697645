"""Prompts that tasks make themselves: seeded whatever ran before, made once, and refused where their makers never come to an end."""

import json
import random
import sys
import time
from types import ModuleType

import pytest

from kvq import taskdata
from kvq.errors import Refusal


@pytest.fixture
def maker(monkeypatch):
    """A task's maker that draws as RULER does: from the global generator and from one of its module's own."""
    from datasets import Dataset

    module = ModuleType("made_utils")
    module.RNG, module.calls = random.Random(42), 0

    def make(max_seq_lengths, **_):
        module.calls += 1
        return {"test": Dataset.from_list([{"input": f"{random.random()} {module.RNG.random()} {length}"} for length in max_seq_lengths])}

    make.__module__ = "made_utils"
    monkeypatch.setitem(sys.modules, "made_utils", module)
    monkeypatch.setattr("kvq.lmeval.task_config", lambda path: {"custom_dataset": make})
    taskdata.made.cache_clear()
    yield module
    taskdata.made.cache_clear()


def text(seed, length=64):
    return taskdata.made("own_task", "own.yaml", json.dumps({"max_seq_lengths": [length]}), seed)["test"][0]["input"]


def test_prompts_follow_the_seed_and_nothing_that_ran_before(maker):
    first = text(1)
    random.seed(5), maker.RNG.random()
    before = random.getstate()
    taskdata.made.cache_clear()
    assert text(1) == first != text(2)
    assert random.getstate() == before


def test_prompts_are_made_once_per_process(maker):
    assert text(1) == text(1) and maker.calls == 1
    assert text(1, 128) != text(1) and maker.calls == 2


def test_an_endless_maker_is_refused(maker, monkeypatch):
    """The loop of vt_utils: whatever goes wrong is swallowed, and nothing is left to shrink."""
    monkeypatch.setattr(taskdata, "PATIENCE", 2.0)
    monkeypatch.setattr(taskdata, "TRY", "while True:\n    try:\n        assert False\n    except:\n        pass\n")
    taskdata._try.cache_clear()
    start = time.monotonic()
    with pytest.raises(Refusal, match="ruler_vt finds no prompt of 512 tokens.*max_seq_lengths"):
        taskdata.made("ruler_vt", "vt.yaml", json.dumps({"max_seq_lengths": [512], "tokenizer": "t"}), 1)
    assert time.monotonic() - start < 30 and maker.calls == 0
    monkeypatch.setattr(taskdata, "TRY", "raise ModuleNotFoundError('No module named wonderwords')")
    with pytest.raises(Refusal, match="cannot make its prompts: .*wonderwords"):
        taskdata._try("ruler_vt", "other", 512)


def test_the_real_maker_ends_at_its_standard_length_and_not_below_its_example():
    pytest.importorskip("wonderwords")
    from kvq.models import ROOT

    tokenizer = str(ROOT / "kvq" / "standin" / "model")
    taskdata._try.cache_clear()
    taskdata._try("ruler_vt", tokenizer, 4096)
    with pytest.raises(Refusal, match="finds no prompt of 512 tokens"):
        taskdata._try("ruler_vt", tokenizer, 512)


def test_the_version_covers_what_examples_are_made_from(monkeypatch, tmp_path):
    import shutil
    from pathlib import Path

    copy = tmp_path / "standin"
    shutil.copytree(Path(taskdata.__file__).parent / "standin", copy, ignore=shutil.ignore_patterns("model", "__pycache__"))
    monkeypatch.setattr(taskdata, "__file__", str(tmp_path / "taskdata.py"))

    def version():
        taskdata.embedded_version.cache_clear()
        return taskdata.embedded_version("suite")

    before = version()
    for name, matters in (("train.py", False), ("mix.py", False), ("suite.py", True), ("prose.py", True), ("lexicon.py", True), ("text/heldout.txt.gz", True)):
        with open(copy / name, "ab") as file:
            file.write(b"\n#")
        after = version()
        assert (after != before) == matters, name
        before = after
    taskdata.embedded_version.cache_clear()


def test_splits_of_embedded_tasks_do_not_meet():
    sources = {}
    splits = taskdata.embedded("gsm8k", {"test_split": "test", "training_split": "train", "fewshot_split": "train"}, sources, 0)
    assert set(splits) == {"test", "train"} and not {r["question"] for r in splits["test"]} & {r["question"] for r in splits["train"]}
    assert "####" in splits["train"][0]["answer"] and len(sources["gsm8k"]) == 16
    with pytest.raises(Refusal, match="no mmlu_anatomy; it has gsm8k"):
        taskdata.embedded("mmlu_anatomy", {}, {}, 0)
