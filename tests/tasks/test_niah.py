"""Needles: prompts equal the stand-in's own, other haystacks, scores, batches, the canary, refusals."""

import os
from pathlib import Path

import pytest

from kvq.errors import Refusal
from kvq.tasks.niah import KINDS, NIAH, found
from tests.tiny_lm import TinyLM, ZeroedLM

SHARED = Path(os.environ.get("KVQ_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
OPTIONS = {"data": "embedded", "limit": 1, "subsets": None, "context": None, "lengths": [768], "depths": 2, "batch_size": 1, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def lm():
    return TinyLM(max_length=2048)


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        lines = [f"Paragraph {i} of file {name} says that the river is {i} miles long, and nobody has ever measured it twice." for i in range(12)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines))
    return tmp_path


def records(lm, some=slice(None), **options):
    task = NIAH(**{**OPTIONS, **options})
    task.check()
    return {r["id"]: r for r in task.run(lm, task.examples(lm)[some])}


def test_embedded_prompts_are_the_stand_ins_own(lm):
    from kvq.standin import needles

    for example in NIAH(**OPTIONS).examples(lm):
        kind, length, depth, trial = example.id.split("/")
        at = {"0.0": 0, "1.0": 1}[depth]
        theirs = needles.generate(kind, 1, int(length), float(depth), lm.tokenizer, 1000 * at + 100_000 * int(length))[int(trial)]
        assert {**example.payload, "length": theirs["length"]} == theirs


def test_every_kind_length_and_depth_once(lm):
    examples = NIAH(**{**OPTIONS, "lengths": [768, 1024], "depths": 3}).examples(lm)
    assert len(examples) == len({e.id for e in examples}) == 6 * 2 * 3 and len({e.subset for e in examples}) == 12
    assert all(len(lm.tokenizer(e.payload["prompt"])["input_ids"]) <= int(e.subset.split("@")[1]) for e in examples)
    assert len({e.payload["prompt"] for e in examples}) == len(examples)


def test_a_folder_is_the_haystack(lm, folder):
    task = NIAH(**{**OPTIONS, "data": str(folder)})
    task.check()
    for example in task.examples(lm):
        prompt, answers = example.payload["prompt"], example.payload["answers"]
        assert "of file a says" in prompt or "of file b says" in prompt
        assert all(answer in prompt for answer in answers) and len(lm.tokenizer(prompt)["input_ids"]) <= 768
    before = task.content
    (folder / "a.txt").write_text((folder / "a.txt").read_text() + " ")
    from kvq.tasks import niah

    niah.text.cache_clear()
    task.check()
    assert task.content != before


def test_real_text_is_a_haystack(lm):
    file = SHARED / "wikitext2_test.raw"
    if not file.exists():
        pytest.skip(f"{file} is absent; set KVQ_SHARED_DATA to the folder with the real test inputs")
    examples = NIAH(**{**OPTIONS, "data": str(file), "subsets": ["single"]}).examples(TinyLM(max_length=2048))
    assert all(e.payload["answers"][0] in e.payload["prompt"] for e in examples)


def test_batches_and_restarts_change_nothing(lm):
    one = records(lm, subsets=["single", "multikey"])
    assert {i: r["prediction"] for i, r in records(lm, subsets=["single", "multikey"], batch_size=3).items()} == {i: r["prediction"] for i, r in one.items()}
    rest = records(lm, slice(2, None), subsets=["single", "multikey"])
    assert rest == {i: one[i] for i in rest}


def test_a_zeroing_cache_changes_the_answers(lm):
    plain, zeroed = records(lm), records(ZeroedLM(max_length=2048))
    for kind in KINDS:
        assert any(plain[i]["prediction"] != zeroed[i]["prediction"] for i in plain if i.startswith(f"{kind}/")), kind


def test_score_is_the_share_of_answers():
    assert found("The codes are ABC and 12.", ["abc", "12", "99", "the"]) == 0.75


@pytest.mark.parametrize(
    "options, words",
    [
        ({"subsets": ["double"]}, "no subset double"),
        ({"limit": 0}, "task.limit=0"),
        ({"data": "/no/such/text"}, "no text"),
        ({"lengths": [4096]}, "exceeds the 2048 tokens"),
        ({"lengths": [32]}, "longer context"),
    ],
)
def test_bad_options_are_refused(lm, options, words):
    with pytest.raises(Refusal, match=words):
        records(lm, **options)


def test_folders_without_text_are_refused(lm, tmp_path):
    with pytest.raises(Refusal, match="holds no .txt file"):
        records(lm, data=str(tmp_path))
    (tmp_path / "short.txt").write_text("one line")
    from kvq.tasks import niah

    niah.text.cache_clear()
    with pytest.raises(Refusal, match="usable paragraphs"):
        records(lm, data=str(tmp_path))
