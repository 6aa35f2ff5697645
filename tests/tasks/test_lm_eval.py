"""Tasks of lm-eval by name: per-example records equal lm-eval's own evaluation on three kinds of task."""

import json

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kvq.errors import Refusal
from kvq.lmeval import quiet
from kvq.tasks.lm_eval import LMEval
from tests.tiny_lm import TinyLM, ZeroedLM

ROWS = [
    {"question": f"{i} plus {i}", "choices": [str(2 * i), str(i), "none of these"], "gold": i % 3, "answer": str(2 * i)} for i in range(8)
]
MEAN = {"aggregation": "mean", "higher_is_better": True}
KINDS = {
    "kind_likelihood": {
        "output_type": "loglikelihood", "doc_to_text": "Q: {{question}} A:", "doc_to_target": " {{answer}}",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    },
    "kind_choice": {
        "output_type": "multiple_choice", "doc_to_text": "Q: {{question}} A:", "doc_to_target": "gold", "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "kind_generate": {
        "output_type": "generate_until", "doc_to_text": "Q: {{question}} A:", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **MEAN}],
        "filter_list": [
            {"name": "whole", "filter": [{"function": "take_first"}]},
            {"name": "digits", "filter": [{"function": "regex", "regex_pattern": "([0-9]+)"}, {"function": "take_first"}]},
        ],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task YAMLs over local JSON files, as a user would write them."""
    folder = tmp_path_factory.mktemp("tasks")
    for split, rows in (("test", ROWS[:6]), ("train", ROWS[6:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    for name, config in KINDS.items():
        kwargs = {"data_files": files, "cache_dir": str(folder / "cache")}
        local = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test", "training_split": "train"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**config, **local}))
    group = {"group": "kinds", "task": list(KINDS), "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (folder / "kinds.yaml").write_text(yaml.safe_dump(group))
    return folder


def records(task, lm, **keep):
    examples = task.examples(lm)
    return {record["id"]: record for record in task.run(lm, examples)}


@pytest.fixture(scope="module")
def lm():
    return TinyLM()


@pytest.fixture(scope="module")
def theirs(folder, lm):
    with quiet():
        model = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, backend="causal", max_length=lm.max_length)
        manager = TaskManager(include_defaults=False, include_path=str(folder))
        return simple_evaluate(model, tasks=list(KINDS), num_fewshot=2, task_manager=manager, bootstrap_iters=0, log_samples=True)


@pytest.mark.parametrize("name", KINDS)
def test_records_equal_lm_eval_to_the_last_digit(name, folder, lm, theirs):
    mine = records(LMEval([name], num_fewshot=2, include_path=str(folder)), lm)
    samples = [s for s in theirs["samples"][name] if s["filter"] in ("none", "whole")]
    assert len(mine) == len(samples) == 6
    for sample in samples:
        record = mine[f"{name}/{sample['doc_id']}"]
        for metric in ("acc", "acc_norm", "exact_match"):
            if metric in sample:
                assert record["metrics"][metric] == sample[metric]
        expected = sample["filtered_resps"]
        if isinstance(expected[0], str):
            assert record["prediction"] == expected[0]
        else:
            likelihoods = json.loads(record["prediction"])
            assert [greedy for _, greedy in likelihoods] == [greedy for _, greedy in expected]
            assert [x for x, _ in likelihoods] == pytest.approx([x for x, _ in expected], abs=1e-5)


def test_score_is_percent_and_corpus_metrics_are_left_out(folder, lm):
    choice = records(LMEval("kind_choice", include_path=str(folder), limit=3), lm)
    assert all(r["metrics"]["score"] == 100 * r["metrics"]["acc_norm"] and r["score_is"] == "acc_norm" for r in choice.values())
    likelihood = records(LMEval("kind_likelihood", include_path=str(folder), limit=3), lm)
    assert all(set(r["metrics"]) == {"score", "acc"} for r in likelihood.values())
    generate = records(LMEval("kind_generate", include_path=str(folder), limit=3), lm)
    assert all(set(r["metrics"]) == {"score", "exact_match", "exact_match/digits"} for r in generate.values())
    json.dumps([choice, likelihood, generate])


def test_resuming_repeats_the_same_prompts(folder, lm):
    task = LMEval("kind_choice", num_fewshot=1, include_path=str(folder))
    whole = records(task, lm)
    rest = task.examples(lm)[3:]
    assert {r["id"]: r for r in task.run(lm, rest)} == {e.id: whole[e.id] for e in rest}


def test_batched_equals_one_by_one(folder, lm):
    one = records(LMEval(list(KINDS), num_fewshot=1, include_path=str(folder)), lm)
    many = records(LMEval(list(KINDS), num_fewshot=1, include_path=str(folder), batch_size=4), lm)
    assert {i: r["metrics"] for i, r in one.items()} == {i: r["metrics"] for i, r in many.items()}


def test_a_zeroing_cache_changes_every_kind(folder):
    for name in KINDS:
        task = LMEval(name, include_path=str(folder))
        plain, zeroed = records(task, TinyLM()), records(task, ZeroedLM())
        assert all(plain[i]["prediction"] != zeroed[i]["prediction"] for i in plain)


def test_one_pass_by_output_type(folder):
    assert LMEval("kind_choice", include_path=str(folder)).one_pass
    assert LMEval("kind_likelihood", include_path=str(folder)).one_pass
    assert not LMEval("kind_generate", include_path=str(folder)).one_pass


def test_a_group_averaged_over_examples_is_one_subset(folder):
    task = LMEval("kinds", include_path=str(folder))
    assert set(task.subset_of) == set(KINDS) and set(task.subset_of.values()) == {"kinds"}


def test_data_from_a_folder(folder, lm, tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text(json.dumps({"goal": "open a jar", "sol1": "twist", "sol2": "shout", "label": 0}) + "\n")
    task = LMEval("piqa", data=str(tmp_path))
    assert list(records(task, lm)) == ["piqa/0"] and len(task.content) == 16


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"tasks": []}, "task.tasks="),
        ({"tasks": "piqa", "data": "embedded"}, "no embedded data"),
        ({"tasks": "wikitext"}, "use task=perplexity"),
        ({"tasks": "piqa", "include_path": "/nowhere"}, "not a folder"),
        ({"tasks": "piqa", "num_fewshot": {"arc_easy": 3}}, "arc_easy"),
    ],
)
def test_refusals_before_any_model(options, sentence):
    with pytest.raises(Refusal, match=sentence):
        LMEval(**options)


def test_a_missing_data_folder_is_refused(tmp_path):
    with pytest.raises(Refusal, match="no folder piqa"):
        LMEval("piqa", data=str(tmp_path)).check()
    (tmp_path / "piqa").mkdir()
    with pytest.raises(Refusal, match="validation.jsonl"):
        LMEval("piqa", data=str(tmp_path)).check()


def test_an_answer_cap_beyond_the_model_is_refused(folder):
    with pytest.raises(Refusal, match="max_new_tokens"):
        LMEval("kind_generate", include_path=str(folder), max_new_tokens=64).examples(TinyLM(max_length=64))
