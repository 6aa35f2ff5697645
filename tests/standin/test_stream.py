"""Training rows: full, labelled, made from training text and training seeds only."""

import json

import numpy as np
import pytest

from kvq.standin import corpus, evaluate, lexicon, stream, train


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf")
    texts = {kind: corpus.sample("train", kind)[:30] for kind in ("code", "prose")}
    (folder / "texts.json").write_text(json.dumps(texts))
    for kind in texts:
        np.save(folder / f"{kind}.npy", np.arange(3, 4003, dtype=np.uint16))
    return lambda seed: stream.Writer(folder, evaluate.MODEL, seed)


@pytest.mark.parametrize("length", [512, 2048])
def test_rows_are_full_and_repeatable(writer, length):
    one, two = writer("1/0"), writer("1/0")
    for _ in range(4):
        ids, classes = one.row(length)
        assert (ids, classes) == two.row(length)
        assert len(ids) == len(classes) == length + 1 and set(classes) <= {0, 1, 2, 3}
    assert writer("2/0").row(length) != writer("1/0").row(length)


def test_every_task_ends_its_answers(writer):
    made = writer("3/0")
    for name in stream.TASKS:
        turns = stream.turns(name, made.rng, made.filler, 600)
        assert turns and all(answer.startswith((" ", "\n")) for _, answer in turns)
    ids, classes = made.task(600, True)
    assert ids[0] == stream.BOS and ids[-1] == stream.EOS and classes[-1] == stream.ANSWER


def test_training_draws_no_evaluation_stream(writer, monkeypatch):
    asked, real = [], lexicon.stream
    monkeypatch.setattr(lexicon, "stream", lambda split, *rest: asked.append(split) or real(split, *rest))
    made = writer("4/0")
    for _ in range(5):
        made.row(1024)
    assert set(asked) == {"train"}


def test_schedule_covers_the_time():
    shares = [phase.share for phase in stream.PHASES]
    assert sum(shares) == pytest.approx(1) and [phase.length for phase in stream.PHASES] == [512, 2048, 8192, 16384]
    assert train.phase_at(0, shares) == 0 and train.phase_at(0.999, shares) == 3
    assert train.rate(0) == 0 and train.rate(0.3) == 1 and train.rate(1) == 0 and train.rate(0.8) == pytest.approx(0.5)
