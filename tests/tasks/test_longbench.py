"""LongBench: prompts and metrics are lm-eval's, data from three places, middle truncation, stops, batches, refusals."""

import json
import os
import shutil
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from kvq.errors import Refusal
from kvq.lmeval import quiet
from kvq.prompt import first_line, fit, render, stop_ids, until_stop
from kvq.tasks.longbench import BARE, CATEGORIES, GROUPS, LENGTH_BALANCED, LongBench, _config, expand
from tests.tiny_lm import TinyLM, ZeroedLM

SHARED = Path(os.environ.get("KVQ_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is absent; set KVQ_SHARED_DATA to the folder with the real test inputs")
    return SHARED / name


def row(index, **changes):
    story = " ".join(f"Box {i} holds a {'red' if i % 2 else 'blue'} ball." for i in range(index + 3))
    upstream = {"input": f"What is in box {index}?", "context": story, "answers": ["a red ball"], "all_classes": None, "_id": f"id{index}"}
    return {**upstream, "length": 9, "dataset": "x", "language": "en", **changes}


@pytest.fixture
def folder(tmp_path):
    """Three subsets in upstream's format, one of them as parquet."""
    import pyarrow as pa
    import pyarrow.parquet

    for subset, changes in (("qasper", {}), ("trec", {"all_classes": ["red", "blue"], "answers": ["red"]})):
        (tmp_path / f"{subset}.jsonl").write_text("".join(json.dumps(row(i, **changes)) + "\n" for i in range(5)))
    pa.parquet.write_table(pa.Table.from_pylist([row(i) for i in range(3)]), tmp_path / "lcc.parquet")
    return tmp_path


@pytest.fixture(scope="module")
def lm():
    return TinyLM(max_length=2048)


def records(task, lm):
    return {record["id"]: record for record in task.run(lm, task.examples(lm))}


def test_lists_match_lm_eval():
    for subset in [*CATEGORIES, *(f"{name}_e" for name in LENGTH_BALANCED)]:
        config = _config(subset)
        assert config["dataset_name"] == subset and config.get("output_type", "generate_until") == "generate_until"
        assert (config["generation_kwargs"]["until"] == ["\n"]) == (subset.removesuffix("_e") in ("trec", "triviaqa", "samsum", "lsht"))
    assert {name: len(group) for name, group in GROUPS.items()} == {"gsrq7": 7, "blockgtq8": 8, "kivi8": 8, "kivi15": 15, "all": 21}
    assert set(BARE) <= set(CATEGORIES)


def test_groups_names_and_lists_expand_without_repeats():
    assert expand("gsrq7") == GROUPS["gsrq7"]
    assert expand(["trec", "blockgtq8"])[:2] == ["trec", "qasper"] and expand(["trec", "blockgtq8"]).count("trec") == 1


def test_embedded_prompts_equal_lm_evals():
    suite, templates = pytest.importorskip("kvq.standin.suite"), pytest.importorskip("kvq.standin.templates")
    lm = TinyLM(max_length=8192)
    task = LongBench(data="embedded", limit=1)
    examples = task.examples(lm)
    assert [e.subset for e in examples] == [s for s in CATEGORIES if s in suite.SUBSETS]
    for example in examples:
        theirs = task._tasks[example.subset].fewshot_context(example.payload, num_fewshot=0)
        assert theirs == templates.prompt(example.subset, {**example.payload, "input": example.payload["question"]})
        assert task.categories[example.subset] == suite.SUBSETS[example.subset]


def test_folder_records(folder, lm):
    task = LongBench(data=str(folder), max_new_tokens=16)
    task.check()
    assert task.subsets == ["qasper", "trec", "lcc"] and len(task.content) == 16
    found = records(task, lm)
    assert list(dict.fromkeys(r["subset"] for r in found.values())) == task.subsets and len(found) == 13
    for record in found.values():
        assert 0 <= record["metrics"]["score"] <= 100 and len(record["metrics"]) == 2 and not record["truncated"] and record["new_tokens"] <= 16
    assert found["qasper/id0"]["target"] == ["a red ball"]
    json.dumps(list(found.values()))


def test_scores_are_lm_evals_times_100(folder, lm):
    task = LongBench(data=str(folder), subsets="trec")
    example = task.examples(lm)[0]
    answer = lm.tokenizer("red or rather a blue one", add_special_tokens=False)["input_ids"]
    record = task._record(example, answer, lm.tokenizer)
    assert record["metrics"] == {"score": 50.0, "classification_score": 50.0}


def test_answers_equal_lm_evals_own_generation(folder, lm):
    task = LongBench(data=str(folder), subsets=["qasper", "trec"], strict_stop=True, max_new_tokens=16)
    found = records(task, lm)
    with quiet():
        stock = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, backend="causal", max_length=lm.max_length)
        for example in task.examples(lm):
            options = {**_config(example.subset)["generation_kwargs"], "max_gen_toks": 16}
            prompt = task._tasks[example.subset].fewshot_context(example.payload, num_fewshot=0)
            assert found[example.id]["prediction"] == stock.generate_until([Instance("generate_until", {}, (prompt, options), 0)], disable_tqdm=True)[0]


def test_batched_equals_one_by_one(folder, lm):
    one = records(LongBench(data=str(folder), max_new_tokens=16), lm)
    four = records(LongBench(data=str(folder), max_new_tokens=16, batch_size=4), lm)
    assert one == four


def test_chunked_prefill_changes_nothing(folder, lm):
    whole, chunked = (records(LongBench(data=str(folder), subsets="qasper", max_new_tokens=8, chunk=c), lm) for c in (None, 64))
    assert whole == chunked


def test_resumed_examples_give_the_same_records(folder, lm):
    task = LongBench(data=str(folder), max_new_tokens=8)
    whole = records(task, lm)
    rest = task.examples(lm)[4:]
    assert {r["id"]: r for r in task.run(lm, rest)} == {e.id: whole[e.id] for e in rest}


def test_a_zeroing_cache_changes_the_answers(folder):
    task = LongBench(data=str(folder), max_new_tokens=16)
    plain, zeroed = records(task, TinyLM(max_length=2048)), records(task, ZeroedLM(max_length=2048))
    for subset in task.subsets:
        assert any(plain[i]["prediction"] != zeroed[i]["prediction"] for i in plain if i.startswith(f"{subset}/"))


def test_middle_truncation_keeps_head_and_tail(folder, lm):
    tokenizer = lm.tokenizer
    text = "HEAD " + "x" * 500 + " TAIL"
    ids, length = fit(tokenizer, text, 100, chat=False)
    kept = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(ids) == 100 and length == 511 and kept.startswith("HEAD ") and kept.endswith(" TAIL")
    assert fit(tokenizer, text, 600, chat=False) == (render(tokenizer, text, False), 511)
    record = next(iter(records(LongBench(data=str(folder), subsets="qasper", limit=1, context=200, max_new_tokens=8), lm).values()))
    assert record["truncated"] == "middle" and record["prompt_tokens"] == 192 < record["full_prompt_tokens"]


def test_a_cap_on_the_prompt_is_one_whatever_the_answer(folder, lm):
    found = records(LongBench(data=str(folder), subsets=["qasper", "lcc"], limit=1, max_prompt_tokens=120, max_new_tokens=4), lm)
    assert {r["prompt_tokens"] for r in found.values()} == {120} and all(r["truncated"] == "middle" for r in found.values())


def test_truncation_survives_characters_of_many_tokens(lm):
    ids, _ = fit(lm.tokenizer, "é漢字" * 200, 101, chat=False)
    assert len(ids) <= 101


def chatty():
    lm = TinyLM(max_length=2048, specials=("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"))
    lm.tokenizer.chat_template = TEMPLATE
    return lm


def test_chat_template_stays_whole_and_is_off_for_few_shot_and_code(folder):
    lm = chatty()
    found = records(LongBench(data=str(folder), max_new_tokens=4, limit=1), lm)
    assert {r["subset"]: r["chat"] for r in found.values()} == {"qasper": True, "trec": False, "lcc": False}
    assert all(r["chat"] for r in records(LongBench(data=str(folder), max_new_tokens=4, limit=1, chat=True), lm).values())
    ids, _ = fit(lm.tokenizer, "y" * 400, 80, chat=True)
    shown = lm.tokenizer.decode(ids)
    assert len(ids) == 80 and shown.startswith("<|im_start|>user\n") and shown.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_stop_ids_join_config_tokenizer_and_family():
    lm = chatty()
    lm.model.generation_config.eos_token_id = [1, 7]
    tokens = lm.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eot_id|>"])
    assert stop_ids(lm) == sorted({1, 7, *tokens})
    assert until_stop([9, 8, 7, 5, 5], [1, 7]) == [9, 8]


def test_the_end_of_a_turn_is_read_off_an_unknown_familys_template():
    lm = TinyLM(max_length=64, specials=("<s>", "</s>", "<pad>", "<turn>", "<over>"))
    assert stop_ids(lm) == [1]
    lm.tokenizer.chat_template = "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}\n<over>{% endfor %}"
    assert stop_ids(lm) == [1, lm.tokenizer.convert_tokens_to_ids("<over>")]
    for template in ("{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}", "{{ raise_exception('a system turn is needed') }}"):
        lm.tokenizer.chat_template = template
        assert stop_ids(lm) == [1]


@pytest.mark.parametrize("family, ends", [("<|eot_id|>", 1), ("<|im_end|>", 1), ("<end_of_turn>", 1), ("<|return|>", 1), ("<｜end▁of▁sentence｜>", 1), ("<|im_start|>", 0)])
def test_turn_ends_of_a_family_stop_though_its_config_omits_them(family, ends):
    lm = TinyLM(max_length=64, specials=("<s>", "</s>", "<pad>", family))
    assert (lm.tokenizer.convert_tokens_to_ids(family) in stop_ids(lm)) == ends


def test_leading_newlines_are_dropped_unless_strict():
    assert first_line("\n\nPerson\nmore", strict=False) == "Person"
    assert first_line("\n\nPerson\nmore", strict=True) == ""


def test_ids_fall_back_to_row_numbers(tmp_path, lm):
    (tmp_path / "qasper.jsonl").write_text("".join(json.dumps(row(0)) + "\n" for _ in range(2)))
    assert [e.id for e in LongBench(data=str(tmp_path)).examples(lm)] == ["qasper/0", "qasper/1"]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"subsets": "qaspar"}, "no subset qaspar. Groups: gsrq7"),
        ({"subsets": []}, "nothing to do"),
        ({"data": "/nowhere"}, "not a folder"),
        ({"data": "/nowhere", "subsets": "trec"}, "not a folder"),
        ({"limit": 0}, "task.limit=0"),
        ({"chat": "yes"}, "auto, true, false"),
        ({"data": "embedded", "subsets": "narrativeqa"}, "embedded data has no narrativeqa"),
    ],
)
def test_refusals_before_any_model(options, sentence):
    with pytest.raises(Refusal, match=sentence):
        LongBench(**options).check()


@pytest.mark.parametrize(
    "text, sentence",
    [
        ('{"input": "a"}\n', "record 1, lacks context, answers"),
        (json.dumps(row(0)) + "\n{broken\n", "record 2, is not JSON"),
        (json.dumps(row(0, answers=[])), "a list of answers"),
        ("", "is empty"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, sentence):
    (tmp_path / "qasper.jsonl").write_text(text)
    with pytest.raises(Refusal, match=sentence):
        LongBench(data=str(tmp_path)).check()


def test_one_file_is_enough(folder, tmp_path):
    file = tmp_path / "longbench_qasper.jsonl"
    file.write_text((folder / "qasper.jsonl").read_text())
    task = LongBench(data=str(file))
    task.check()
    assert task.subsets == ["qasper"] and len(task._docs["qasper"]) == 5
    with pytest.raises(Refusal, match="not called like a LongBench subset"):
        LongBench(data=str(shutil.copy(file, tmp_path / "mine.jsonl")))
    with pytest.raises(Refusal, match="no trec.jsonl .* holds qasper"):
        LongBench(data=str(file), subsets="trec").check()


def test_missing_files_are_refused(folder, tmp_path_factory):
    with pytest.raises(Refusal, match="no samsum.jsonl"):
        LongBench(data=str(folder), subsets="samsum").check()
    with pytest.raises(Refusal, match="no file called like"):
        LongBench(data=str(tmp_path_factory.mktemp("empty")))


def test_refusals_that_need_the_model(folder, lm):
    for options, sentence in (({"context": 4096}, "exceeds the 2048"), ({"context": 100}, "fills the context"), ({"chat": True}, "no chat template")):
        with pytest.raises(Refusal, match=sentence):
            LongBench(data=str(folder), subsets="qasper", **options).examples(lm)


def test_real_multi_news_with_a_real_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = shared("models/stories260K")
    shutil.copy(shared("longbench_multi_news.jsonl"), tmp_path / "multi_news.jsonl")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(weights), AutoTokenizer.from_pretrained(weights)
    lm = TinyLM(model, tokenizer, max_length=1024)
    one, two = (records(LongBench(data=str(tmp_path), limit=2, context=1024, max_new_tokens=32, batch_size=n), lm) for n in (1, 2))
    assert one == two and len(one) == 2
    for record in one.values():
        assert record["truncated"] == "middle" and record["prompt_tokens"] <= 992 and record["prediction"].strip()
        assert 0 < record["metrics"]["score"] < 40 and record["metrics"]["score"] == record["metrics"]["rouge_score"]
