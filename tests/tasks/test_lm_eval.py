"""Tasks of lm-eval by name: per-example records equal lm-eval's own evaluation on three kinds of task."""

import json

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kvq import models
from kvq.baselines.fp16 import FP16
from kvq.errors import Refusal
from kvq.lmeval import CachedLM, quiet
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


@pytest.fixture(scope="module")
def wrapped():
    """(the stand-in in float16 under our 16-bit cache, lm-eval's own HFLM on the same weights): nothing is rounded on the way into the cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = models.ROOT / "kvq" / "standin" / "model"
    model, tokenizer = models.load(str(path), dtype="float16", device="cpu")

    def codec():
        made = FP16(16)
        made.shape = torch.tensor([2, 128])
        return made

    lm = models.LM(model, tokenizer, "standin", [(codec(), codec()) for _ in range(model.config.num_hidden_layers)])
    with quiet():
        plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16, attn_implementation="sdpa").eval()
        return lm, HFLM(pretrained=plain, tokenizer=AutoTokenizer.from_pretrained(path), backend="causal", max_length=lm.max_length)


def test_our_fp16_cache_equals_hflm_to_the_last_digit(folder, wrapped):
    """The same requests of three kinds of task, one at a time, every logit computed as HFLM does."""
    lm, stock = wrapped
    adapter = CachedLM(lm, all_logits=True)
    for name in KINDS:
        task = LMEval(name, num_fewshot=2, include_path=str(folder))
        requests = [request for example in task.examples(lm) for request in example.payload[1]]
        kind = requests[0].request_type
        with quiet():
            mine, theirs = (getattr(each, kind)(requests, disable_tqdm=True) for each in (adapter, stock))
        assert len(mine) == (18 if name == "kind_choice" else 6) and mine == theirs, name
    assert lm.usage()["encoded"] > 1000, "our cache held the tokens"


def test_scores_under_our_fp16_cache_equal_hflms(folder, wrapped):
    lm, stock = wrapped
    with quiet():
        manager = TaskManager(include_defaults=False, include_path=str(folder))
        theirs = simple_evaluate(stock, tasks=list(KINDS), num_fewshot=2, task_manager=manager, bootstrap_iters=0, log_samples=True)
    mine = records(LMEval(list(KINDS), num_fewshot=2, include_path=str(folder), batch_size=2), lm)
    for name in KINDS:
        for sample in theirs["samples"][name]:
            record = mine[f"{name}/{sample['doc_id']}"]
            for metric in ("acc", "acc_norm", "exact_match"):
                if metric in sample and sample["filter"] in ("none", "whole"):
                    assert record["metrics"][metric] == sample[metric], (name, metric)


def test_score_is_percent_and_corpus_metrics_are_left_out(folder, lm):
    choice = records(LMEval("kind_choice", include_path=str(folder), limit=3), lm)
    assert all(r["metrics"]["score"] == 100 * r["metrics"]["acc_norm"] and r["score_is"] == "acc_norm" for r in choice.values())
    likelihood = records(LMEval("kind_likelihood", include_path=str(folder), limit=3), lm)
    assert all(set(r["metrics"]) == {"score", "acc"} for r in likelihood.values())
    generate = records(LMEval("kind_generate", include_path=str(folder), limit=3), lm)
    assert all(set(r["metrics"]) == {"score", "exact_match", "exact_match/digits"} for r in generate.values())
    json.dumps([choice, likelihood, generate])


def test_the_score_can_be_another_metric(folder, lm):
    chosen = records(LMEval("kind_generate", include_path=str(folder), limit=3, score="exact_match/digits"), lm)
    assert all(r["metrics"]["score"] == 100 * r["metrics"]["exact_match/digits"] for r in chosen.values())
    with pytest.raises(Refusal, match="no metric f1; task.score is one of exact_match, exact_match/digits"):
        records(LMEval("kind_generate", include_path=str(folder), limit=1, score="f1"), lm)


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
        ({"tasks": "winogrande", "data": "embedded"}, "embedded data has no winogrande"),
        ({"tasks": "piqa", "batch_size": "all"}, "or auto"),
        ({"tasks": "wikitext"}, "use task=perplexity"),
        ({"tasks": "piqa", "include_path": "/nowhere"}, "not a folder"),
        ({"tasks": "piqa", "num_fewshot": {"arc_easy": 3}}, "no entry for piqa .it has arc_easy."),
    ],
)
def test_refusals_before_any_model(options, sentence):
    with pytest.raises(Refusal, match=sentence):
        LMEval(**options).check()


def test_a_missing_data_folder_is_refused(tmp_path):
    with pytest.raises(Refusal, match="no folder piqa"):
        LMEval("piqa", data=str(tmp_path)).check()
    (tmp_path / "piqa").mkdir()
    with pytest.raises(Refusal, match="validation.jsonl"):
        LMEval("piqa", data=str(tmp_path)).check()


@pytest.mark.parametrize(
    "task, split, row, words",
    [
        ("piqa", "validation", {"goal": "x", "sol1": "a", "label": 0}, "lacks the column sol2"),
        ("piqa", "validation", {"goal": "x", "sol1": "a", "sol2": "b"}, "lacks the column label"),
        ("gsm8k", "test", {"question": "x"}, "lacks the column answer"),
        ("hendrycks_math500", "test", {"problem": "x"}, "hendrycks_math500 lack the column 'solution'"),
        ("piqa", "validation", None, "is empty"),
    ],
)
def test_missing_columns_are_refused(task, split, row, words, tmp_path):
    (tmp_path / task).mkdir()
    (tmp_path / task / f"{split}.jsonl").write_text("" if row is None else json.dumps(row) + "\n")
    with pytest.raises(Refusal, match=words):
        LMEval(task, data=str(tmp_path)).check()


def test_lengths_beyond_the_model_are_refused():
    for options, words in (({"metadata": {"max_seq_lengths": [4096, 8192]}}, "metadata.max_seq_lengths"), ({"max_new_tokens": 2048}, "max_new_tokens")):
        with pytest.raises(Refusal, match=words):
            LMEval("piqa", **options).fits(2048, "tiny")
        LMEval("piqa", **options).fits(16384, "large")


@pytest.mark.parametrize("task, shots", [("gsm8k", 2), ("hendrycks_math500", 0), ("arc_challenge", 2), ("hellaswag", 1), ("piqa", 0)])
def test_embedded_documents(task, shots):
    lm = TinyLM(max_length=4096)
    made = LMEval(task, num_fewshot=shots or None, data="embedded", limit=3, max_new_tokens=8)
    found = records(made, lm)
    assert len(found) == 3 and all(0 <= r["metrics"]["score"] <= 100 for r in found.values())
    prompt = made.examples(lm)[0].payload[1][0].arguments[0]
    splits = made._tasks[task].dataset
    scored, others = ({json.dumps(row, sort_keys=True) for row in split} for split in (made._tasks[task].eval_docs, splits.get("train", [])))
    assert not scored & others and len(scored) == 200 and len(prompt) > 50, "shots are other documents than those scored"
    other = LMEval(task, data="embedded", seed=1)
    again = LMEval(task, data="embedded")
    other.check(), again.check()
    assert made.content == again.content != other.content


def test_embedded_fewshot_keeps_the_tasks_that_have_data():
    task = LMEval(["arc_challenge", "winogrande", "piqa"], {"winogrande": 5, "arc_challenge": 1, "piqa": 0}, data="embedded")
    assert task.names == ["arc_challenge", "piqa"]


def test_an_answer_cap_beyond_the_model_is_refused(folder):
    with pytest.raises(Refusal, match="max_new_tokens"):
        LMEval("kind_generate", include_path=str(folder), max_new_tokens=64).examples(TinyLM(max_length=64))
