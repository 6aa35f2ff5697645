"""Embedded multiple choice: likelihoods are the model's own, batches and restarts change nothing, the canary collapses it."""

import json

import pytest
import torch

from kvq.errors import Refusal
from kvq.tasks.choices import Choices
from tests.tiny_lm import TinyLM, ZeroedLM

OPTIONS = {"limit": 4, "lines": 6}


@pytest.fixture(scope="module")
def lm():
    return TinyLM(max_length=512)


def records(task, lm, some=slice(None)):
    return {r["id"]: r for r in task.run(lm, task.examples(lm)[some])}


def test_likelihoods_are_the_models_own(lm):
    task = Choices(**OPTIONS)
    found = records(task, lm)
    for example in task.examples(lm):
        item, record = example.payload, found[example.id]
        for choice, likelihood in zip(item["choices"], record["likelihoods"], strict=True):
            context, whole = (lm.tokenizer(text)["input_ids"] for text in (item["context"], f"{item['context']} {choice}"))
            with torch.no_grad():
                logits = lm.model(torch.tensor([whole])).logits[0, len(context) - 1 : -1].log_softmax(-1)
            assert likelihood == pytest.approx(float(logits.gather(1, torch.tensor(whole[len(context) :])[:, None]).sum()), abs=1e-3)
        assert record["metrics"]["score"] == 100.0 * (record["prediction"] == record["target"]) and record["chance"] == 25


def test_batches_and_restarts_change_nothing(lm):
    one, three = (records(Choices(**OPTIONS, batch_size=b), lm) for b in (1, 3))
    assert [r["prediction"] for r in one.values()] == [r["prediction"] for r in three.values()]
    assert records(Choices(**OPTIONS, batch_size=1), lm, slice(2, None)) == dict(list(one.items())[2:])


def test_a_zeroing_cache_changes_the_likelihoods(lm):
    task = Choices(**OPTIONS)
    plain, zeroed = records(task, lm), records(task, ZeroedLM(max_length=512))
    assert all(plain[i]["likelihoods"] != zeroed[i]["likelihoods"] for i in plain)


def test_a_file_of_items(tmp_path, lm):
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps({"context": "one two", "choices": ["a", "bc"], "gold": 1}) + "\n")
    record = records(Choices(data=str(file)), lm)["choices/0"]
    assert record["target"] == "bc" and record["chance"] == 50 and record["metrics"]["gold_loss"] > 0
    for bad in ({"context": "x", "choices": ["a"], "gold": 0}, {"context": "x", "choices": ["a", "b"], "gold": 2}, {"choices": ["a", "b"], "gold": 0}):
        file.write_text(json.dumps(bad) + "\n")
        with pytest.raises(Refusal, match="record 1: expected context"):
            Choices(data=str(file)).check()


@pytest.mark.parametrize(
    "options, words",
    [({"limit": 0}, "task.limit=0"), ({"lines": 2}, "task.lines=2"), ({"data": "hub"}, "task=fewshot"), ({"data": "/no/file"}, "not a file"), ({"subsets": ["a"]}, "no subsets")],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(Refusal, match=words):
        Choices(**options).check()


def test_items_longer_than_the_model_are_refused():
    with pytest.raises(Refusal, match="set task.lines below 48"):
        Choices(limit=1).examples(TinyLM(max_length=128))
