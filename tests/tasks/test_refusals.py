"""What cannot work is refused in one sentence that says what to do, before a model is loaded."""

import json

import pytest

from kvq import models, runner
from kvq.errors import Refusal
from tests.tasks.test_canary import compose

CASES = {
    "longbench folder": (["task=longbench", "task.data=/nowhere"], "not a folder. Pass task.data="),
    "longbench column": (["task=longbench", "task.data={bad}", "task.subsets=qasper"], "record 1, lacks context"),
    "longbench context": (["task=longbench", "task.context=40000"], "exceeds the 16384 tokens of standin: set it to 16384 or less"),
    "niah folder": (["task=niah", "task.data=/nowhere"], "no text"),
    "niah lengths": (["task=niah", "task.lengths=[1024,32000]"], "task.lengths=.32000. with 30 new tokens exceeds the 16384"),
    "aime folder": (["task=aime", "task.data=/nowhere"], "does not exist"),
    "aime column": (["task=aime", "task.data={bad}/problems.jsonl"], "record 1, lacks a problem or an answer; it has the columns problem"),
    "aime answers": (["task=aime", "task.data={bad}/good.jsonl", "task.max_new_tokens=32768"], "leave no room .* lower task.max_new_tokens"),
    "perplexity file": (["task=perplexity", "task.data=/nowhere"], "no text"),
    "perplexity context": (["task=perplexity", "task.context=40000"], "longer than standin allows .16384.: set it to"),
    "choices file": (["task=choices", "task.data=/nowhere"], "not a file; give one with the columns"),
    "choices column": (["task=choices", "task.data={bad}/problems.jsonl"], "record 1: expected context"),
    "choices lines": (["task=choices", "task.lines=5000", "task.limit=1"], "task.lines=5000 .* lower it"),
    "gsm8k folder": (["task=gsm8k", "task.data=/nowhere"], "has no folder gsm8k"),
    "gsm8k column": (["task=gsm8k", "task.data={bad}"], "lacks the column answer; it has question"),
    "gsm8k cap": (["task=gsm8k", "task.max_new_tokens=20000"], "more than the 16384 tokens that standin holds"),
    "fewshot folder": (["task=fewshot", "task.data=/nowhere"], "has no folder arc_challenge"),
    "lm_eval embedded": (["task=lm_eval", "task.tasks=[winogrande]"], "embedded data has no winogrande; it has gsm8k"),
    "math500 folder": (["task=math500", "task.data={bad}"], "has no folder hendrycks_math500"),
    "batch size": (["task=niah", "task.batch_size=many"], "at least 1, or auto"),
    "shots": (["task=aime", "task.data={bad}/good.jsonl", "task.shots=2"], "only task.data=embedded has"),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "qasper.jsonl").write_text(json.dumps({"input": "a", "answers": ["b"]}) + "\n")
    (folder / "problems.jsonl").write_text(json.dumps({"problem": "a"}) + "\n")
    (folder / "good.jsonl").write_text(json.dumps({"problem": "a", "answer": 1}) + "\n")
    (folder / "gsm8k").mkdir()
    for split in ("train", "test"):
        (folder / "gsm8k" / f"{split}.jsonl").write_text(json.dumps({"question": "a"}) + "\n")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_refused_before_a_model_is_loaded(case, bad, tmp_path, monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("a model was loaded first")

    monkeypatch.setattr(models, "_load", load)
    words, sentence = CASES[case]
    cfg = compose("quant=int4", *(word.format(bad=bad) for word in words), f"results={tmp_path}/results", f"outputs={tmp_path}/outputs")
    with pytest.raises(Refusal, match=sentence) as caught:
        runner.run(cfg, {"model": "standin", "quant": "int4", "task": words[0].split("=")[1], "calib": "text"})
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
