"""The stand-in's calibration text: both halves everywhere, nothing that an evaluation uses."""

import hashlib

from transformers import AutoTokenizer

from kvq import calibrate
from kvq.standin import corpus, evaluate, mix, suite


def test_it_holds_the_training_sample_and_tasks_by_turns():
    text = mix.mixed()
    assert text == calibrate.text("standin:mixed")
    sample = sum(len(document) for document in corpus.sample("train"))
    assert 1.8 * sample < len(text) < 2.6 * sample
    quarter = len(text) // 40  # what the default of eight windows sees, nearly
    for start in range(0, len(text) - quarter, quarter):
        stretch = text[start : start + quarter]
        assert "Answer" in stretch or "answer" in stretch, start
    assert sum(text.count(document[:200]) > 0 for document in corpus.sample("train")) > 0.9 * len(corpus.sample("train"))


def test_it_is_the_same_every_time():
    first = mix.mixed.__wrapped__()
    assert hashlib.sha256(first.encode()).digest() == hashlib.sha256(mix.mixed().encode()).digest()


def test_no_evaluation_document_or_held_out_text_is_in_it():
    text = mix.mixed()
    for document in corpus.sample("heldout"):  # from the middle: licences at the top are everybody's
        assert len(document) < 600 or document[len(document) // 2 :][:200] not in text
    tokenizer = AutoTokenizer.from_pretrained(evaluate.MODEL)
    for subset in [name for name, category in suite.SUBSETS.items() if category != "code"]:  # lines of code recur everywhere
        for document in suite.generate(subset, 2, 1024, tokenizer, seed=0):
            lines = [line for line in document["context"].split("\n") if len(line) > 40]
            assert sum(line in text for line in lines) <= 0.1 * len(lines), subset
