"""AIME: integers out of answers, data from three places, seeded repeats, statistics over problems, refusals."""

import json
import os
from pathlib import Path

import pytest
import torch

from kvq import statistics
from kvq.errors import Refusal
from kvq.tasks.aime import AIME, boxes, integer
from tests.tiny_lm import TinyLM, ZeroedLM

SHARED = Path(os.environ.get("KVQ_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@pytest.fixture
def folder(tmp_path):
    rows = [{"problem": f"What is {i} + {i}?", "answer": f"{2 * i:03d}", "id": f"I-{i}"} for i in range(3)]
    (tmp_path / "aime24.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def records(task, lm, some=slice(None)):
    return {r["id"]: r for r in task.run(lm, task.examples(lm)[some])}


@pytest.mark.parametrize(
    "text, value, rule",
    [
        (r"so \boxed{33}.", 33, "box"),
        (r"\boxed{033}", 33, "box"),
        (r"\boxed{33.0}", 33, "box"),
        (r"\boxed{33.}", 33, "box"),
        (r"\boxed{\text{33}}", 33, "box"),
        (r"\boxed{\mathbf{33}}", 33, "box"),
        (r"\boxed{\textbf{(33)}}", None, None),
        (r"\boxed{n=33}", 33, "box"),
        (r"Final $m+n=\boxed{70}$", 70, "box"),
        (r"\boxed{m + n = 70}", 70, "box"),
        (r"\boxed{33^\circ}", 33, "box"),
        (r"\boxed{33^{\circ}}", 33, "box"),
        (r"\boxed{33\%}", 33, "box"),
        (r"\boxed{204 \text{ minutes}}", 204, "box"),
        (r"\boxed{$204$}", 204, "box"),
        (r"\boxed{1{,}024}", 1024, "box"),
        (r"\boxed{1,024}", 1024, "box"),
        (r"\boxed{-7}", -7, "box"),
        (r"\boxed{ 0 }", 0, "box"),
        (r"\fbox{12}", 12, "box"),
        (r"first \boxed{12}, then \boxed{34}", 34, "box"),
        (r"\boxed{12} and then \boxed{\frac{1}{2}}", 12, "box"),
        (r"\boxed{12} cut off in \boxed{34", 12, "box"),
        (r"<think>\boxed{1}</think> The answer is \boxed{2}.", 2, "box"),
        ("The answer is 33", 33, "sentence"),
        ("The answer is: **33**.", 33, "sentence"),
        ("The answer is $1,024$, I think, of 5.", 1024, "sentence"),
        ("the final answer is 33.0", 33, "sentence"),
        ("the answer is 3.5, or 4", 4, "last integer"),
        ("$x=2$ and $33$", 33, "last integer"),
        ("x-33.", 33, "last integer"),
        ("it falls to -4", -4, "last integer"),
        ("half of 3.5", None, None),
        ("no idea", None, None),
        ("", None, None),
    ],
)
def test_integers_are_found(text, value, rule):
    found = integer(text)
    if rule is None and "boxed" in text:  # an unreadable box falls back to the loose rule
        assert found in ((None, None), (33, "last integer"))
    else:
        assert found == (value, rule)


def test_boxes_balance_braces():
    assert boxes(r"a \boxed{\frac{1}{2}} b \boxed {x} \boxed{open") == [r"\frac{1}{2}", "x"]


def test_the_real_problems_load():
    if not (SHARED / "aime24.jsonl").exists():
        pytest.skip(f"{SHARED / 'aime24.jsonl'} is absent; set KVQ_SHARED_DATA to the folder with the real test inputs")
    task = AIME(data=str(SHARED / "aime24.jsonl"), repeats=2, max_new_tokens=8)
    examples = task.examples(TinyLM(max_length=4096))
    assert len(examples) == 60 and len({e.id for e in examples}) == 60 and {e.subset for e in examples} == {"aime24"}
    assert all(0 <= e.payload["answer"] <= 999 for e in examples) and examples[0].payload["answer"] == 204


def test_samples_are_the_same_in_any_batch_and_after_a_restart(folder):
    lm = TinyLM(max_length=256)
    options = {"data": str(folder), "repeats": 3, "max_new_tokens": 12}
    before = torch.random.get_rng_state()
    one, four = records(AIME(**options), lm), records(AIME(**options, batch_size=4), lm)
    assert torch.equal(before, torch.random.get_rng_state())
    assert one == four and len(one) == 9
    assert records(AIME(**options), lm, slice(4, None)) == dict(list(one.items())[4:])
    texts = {r["prediction"] for r in one.values()}
    assert len(texts) == 9, "every repeat has its own stream"
    assert {r["prediction"] for r in records(AIME(**options, seed=1), lm).values()}.isdisjoint(texts)


def test_greedy_repeats_once(folder):
    lm = TinyLM(max_length=256)
    first, again = (records(AIME(data=str(folder), repeats=1, temperature=0, max_new_tokens=8, seed=s), lm) for s in (0, 1))
    assert first == again and len(first) == 3


def test_a_zeroing_cache_changes_the_samples(folder):
    task = AIME(data=str(folder), repeats=1, max_new_tokens=12)
    plain, zeroed = records(task, TinyLM(max_length=256)), records(task, ZeroedLM(max_length=256))
    assert any(plain[i]["prediction"] != zeroed[i]["prediction"] for i in plain)


class Scripted(TinyLM):
    """Answers with given texts, whatever is asked."""

    def __init__(self, answers, **options):
        super().__init__(**options)
        self.answers = iter(answers)

    def generate(self, ids, mask, max_new_tokens, stop_ids, **options):
        rows = [self.tokenizer(next(self.answers), add_special_tokens=False)["input_ids"][:max_new_tokens] for _ in ids]
        width = max(map(len, rows)) + 1
        return torch.tensor([row + [self.tokenizer.eos_token_id] * (width - len(row)) for row in rows])[:, :max_new_tokens]


def test_average_over_repeats_and_errors_over_problems(folder):
    right, wrong, endless = r"\boxed{%d}", r"\boxed{999}", "9" * 40
    lm = Scripted([right % 0, wrong, right % 2, right % 2, wrong, endless], max_length=256)
    task = AIME(data=str(folder), repeats=2, max_new_tokens=16)
    found = list(task.run(lm, sorted(task.examples(lm), key=lambda e: e.id)))
    assert [r["metrics"]["score"] for r in found] == [100, 0, 100, 100, 0, 0]
    assert [r["metrics"]["finished"] for r in found] == [100] * 5 + [0]
    row = statistics.summarize(found).set_index("metric").loc["score"]
    assert row["n"] == 3 and row["value"] == 50 and row["stderr"] == pytest.approx(50 / 3**0.5)


def test_embedded_problems_need_few_tokens():
    task = AIME(data="embedded", limit=2, repeats=1, shots=0)
    examples = task.examples(TinyLM(max_length=1024))
    assert task.cap == 100 and [e.id for e in examples] == ["arithmetic/0/0", "arithmetic/1/0"]
    assert AIME(data="embedded", limit=2, seed=1, repeats=1, shots=0).examples(TinyLM(max_length=1024))[0].payload["problem"] != examples[0].payload["problem"]


def test_solved_problems_stand_in_front_of_embedded_ones():
    lm = TinyLM(max_length=8192)
    bare, shown = (AIME(data="embedded", limit=3, repeats=1, shots=n).examples(lm) for n in (0, None))
    for a, b in zip(bare, shown, strict=True):
        short, long = (lm.tokenizer.decode(e.payload["prompt"], skip_special_tokens=True) for e in (a, b))
        assert long.endswith(short) and long.count("The answer is \\boxed{") == 4 and a.payload["problem"] not in long[: -len(short)]
        assert a.id == b.id and a.payload["answer"] == b.payload["answer"]
    with pytest.raises(Refusal, match="only task.data=embedded has"):
        AIME(data="hub", shots=1)
    with pytest.raises(Refusal, match="task.shots=-1"):
        AIME(data="embedded", shots=-1)
    assert AIME(data="hub").shots == 0


def test_opening_is_added_once(folder):
    lm = TinyLM(max_length=256)
    task = AIME(data=str(folder), repeats=1, max_new_tokens=4, opening="<think>\n")
    assert lm.tokenizer.decode(task.examples(lm)[0].payload["prompt"]).endswith("Answer:<think>\n")
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    prompt = lm.tokenizer.decode(task.examples(lm)[0].payload["prompt"])
    assert prompt.count("<think>") == 1 and r"\boxed{}" in prompt


@pytest.mark.parametrize(
    "options, words",
    [
        ({"repeats": 0}, "task.repeats=0"),
        ({"temperature": 0}, "task.repeats=1"),
        ({"temperature": -1}, "must not be negative"),
        ({"top_p": 0}, "task.top_p=0"),
        ({"chat": "yes"}, "task.chat=yes"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(Refusal, match=words):
        AIME(**options)


def test_bad_data_is_refused(tmp_path, folder):
    for data, subsets, words in ((tmp_path / "no", None, "does not exist"), (folder, ["aime25"], "there are aime24")):
        with pytest.raises(Refusal, match=words):
            AIME(data=str(data), subsets=subsets).check()
    bad = tmp_path / "bad.jsonl"
    for line, words in (('{"problem": "x", "answer": "1/2"}', "record 1: the answer '1/2'"), ('{"problem": "x"}', "lacks a problem or an answer"), ("{", "not JSON")):
        bad.write_text(line + "\n")
        with pytest.raises(Refusal, match=words):
            AIME(data=str(bad)).check()
    for cap, words in ((None, "lower task.max_new_tokens"), (250, "set task.max_new_tokens=")):
        with pytest.raises(Refusal, match=words):
            AIME(data=str(folder / "aime24.jsonl"), max_new_tokens=cap or 32768).examples(TinyLM(max_length=256))
