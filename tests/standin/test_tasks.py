"""Evaluation documents: same seed, same document; no longer than asked; answerable from the prompt; never a training seed."""

import json
import random

import pytest
from transformers import AutoTokenizer

from kvq.standin import arithmetic, choices, evaluate, filler, lexicon, needles, suite, templates

SUMMARIES = ("gov_report", "qmsum")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(evaluate.MODEL)


@pytest.mark.parametrize("subset", suite.SUBSETS)
def test_suite_documents(tokenizer, subset):
    for tokens in (512, 2048):
        made = suite.generate(subset, 3, tokens, tokenizer, 5)
        assert made == suite.generate(subset, 3, tokens, tokenizer, 5) != suite.generate(subset, 3, tokens, tokenizer, 6)
        assert made[:2] == suite.generate(subset, 2, tokens, tokenizer, 5)
        for document in made:
            assert set(document) == {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}
            assert json.loads(json.dumps(document)) == document
            size = len(tokenizer(templates.prompt(subset, document))["input_ids"])
            assert 0.6 * tokens < size <= tokens
            for answer in document["answers"]:
                assert len(tokenizer(answer, add_special_tokens=False)["input_ids"]) <= (96 if subset in SUMMARIES else 32)
    assert len({document["_id"] for document in made}) == 3


@pytest.mark.parametrize("subset", ["multifieldqa_en", "hotpotqa", "2wikimqa", "trec", "triviaqa", "passage_retrieval_en"])
def test_answers_stand_in_the_context(tokenizer, subset):
    for document in suite.generate(subset, 6, 1024, tokenizer, 2):
        assert document["answers"][0] in document["context"] + document["input"]


def test_counts_and_paragraph_numbers_are_right(tokenizer):
    for document in suite.generate("passage_count", 8, 1024, tokenizer, 3):
        paragraphs = [part.split(": ", 1)[1] for part in document["context"].split("\n\n")]
        assert str(len(set(paragraphs))) == document["answers"][0]
    for document in suite.generate("passage_retrieval_en", 8, 1024, tokenizer, 3):
        holder = [part for part in document["context"].split("\n\n") if document["input"] in part]
        assert any(part.startswith(document["answers"][0] + ":") for part in holder)


def test_suite_refuses_what_it_does_not_have(tokenizer):
    with pytest.raises(ValueError, match="subset"):
        suite.generate("musique", 1, 2048, tokenizer, 0)


@pytest.mark.parametrize("kind", needles.KINDS)
def test_needles(tokenizer, kind):
    for tokens in (512, 4096):
        made = needles.generate(kind, 2, tokens, 0.5, tokenizer, 9)
        assert made == needles.generate(kind, 2, tokens, 0.5, tokenizer, 9)
        for document in made:
            assert document["length"] == len(tokenizer(document["prompt"])["input_ids"]) <= tokens
            assert document["length"] > 0.85 * tokens and document["prompt"].endswith(("Answer:", "Answers:"))
            assert all(answer in document["prompt"] for answer in document["answers"])


def test_needle_depth_is_kept(tokenizer):
    for depth in (0.0, 0.5, 1.0):
        document = needles.generate("single", 1, 4096, depth, tokenizer, 4)[0]
        place = document["prompt"].index(document["answers"][0]) / len(document["prompt"])
        assert abs(place - depth) < 0.12
    with pytest.raises(ValueError, match="depth"):
        needles.generate("single", 1, 512, 1.5, tokenizer, 0)


def test_pieces_of_text_encode_as_the_whole(tokenizer):
    count, rng = filler.count(tokenizer), random.Random(0)
    for document in needles.generate("multi", 3, 512, 0.5, tokenizer, 1):
        text = document["prompt"] + " " + document["answers"][0]
        cuts = [at for at in range(1, len(text)) if text[at] in " \n" and text[at - 1].isalnum()]
        at = rng.choice(cuts)
        assert count(text[:at]) + count(text[at:]) == count(text)


def test_arithmetic_steps_lead_to_the_answer():
    made = arithmetic.generate(50, 3)
    assert made == arithmetic.generate(50, 3)
    for item in made:
        for step in item["steps"].split("\n"):
            left, right = step.split(" = ")
            a, sign, b = left.split()
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(right)
        assert item["steps"].endswith(f"= {item['answer']}") and 0 <= int(item["answer"]) <= 999


def test_choices_hold_the_right_ending_once():
    made = choices.generate(30, 3)
    assert made == choices.generate(30, 3) and {item["gold"] for item in made} == {0, 1, 2, 3}
    for item in made:
        assert len(set(item["choices"])) == 4
        asked = item["context"].split("\n")[-1]
        right = [line for line in item["context"].split("\n")[:-1] if line.startswith(asked + " ")]
        assert right and all(line.endswith(item["choices"][item["gold"]]) for line in right)


def test_training_and_evaluation_streams_never_meet():
    names = [(split, seed, index) for split in ("train", "eval") for seed in range(20) for index in range(20)]
    firsts = {lexicon.stream(split, "needles", seed, index).getrandbits(128) for split, seed, index in names}
    assert len(firsts) == len(names)
    with pytest.raises(ValueError, match="split"):
        lexicon.stream("test", "needles", 0)
