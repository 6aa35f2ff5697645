"""Batches that fit, and beginnings that are read once: the same answers, the same books, every shared token encoded once."""

import json

import pytest
import torch
from lm_eval.api.instance import Instance

from kvq import batches
from kvq.errors import Refusal
from kvq.lmeval import CachedLM
from kvq.models import LM
from kvq.prompt import left_pad, stop_ids
from kvq.tasks.aime import AIME
from kvq.tasks.longbench import LongBench
from tests.kvq.codecs import Exact, Lossy, Spy, pairs
from tests.tiny_lm import TinyLM

STORY = "".join(f"Box {i} holds a {'red' if i % 3 else 'blue'} ball and key {i * 7}. " for i in range(12))
ASKED = ["What is in box 3?", "Which key lies in box 11, and why there?", "How many?", "Name the colours."]


def bind(make=Lossy, **options):
    """An LM on a tiny model with a byte tokenizer."""
    tiny = TinyLM(max_length=2048)
    model = tiny.model
    model.set_attn_implementation("kvq")
    return LM(model, tiny.tokenizer, "tiny", pairs(model, make), **options)


def prompts(lm):
    return [lm.tokenizer(f"{STORY}\n{question}")["input_ids"] for question in ASKED] + [lm.tokenizer("Something else.")["input_ids"]]


def answered(lm, size=8, **options):
    found = {i: (row, ended) for i, row, ended in batches.answers(lm, prompts(lm), 12, size, stop_ids(lm), **options)}
    return found, lm.usage()


def test_prompts_that_begin_alike_are_found():
    a, b = list(range(100)), list(range(80)) + [7] * 30
    groups = batches.together([[5] * 90, a, [1, 2], b, a[:99]], least=64)
    assert groups == [(80, [3, 1, 4]), (0, [0, 2])]
    assert batches.together([a, a], least=64) == [(98, [0, 1])], "two tokens are left to read"
    assert batches.together([a[:60], a[:60]], least=64) == [(0, [0, 1])] and batches.together([]) == []
    assert batches.together([a[:70] + [9] * 200, a]) == [(0, [0, 1])], "less than half in common"


@pytest.mark.parametrize("options", [{}, {"sink": 4}, {"prefill": "exact"}, {"memo": False}, {"make": lambda: Lossy(space="post")}])
@pytest.mark.parametrize("size, chunk", [(8, None), (2, None), (8, 32), (1, None)])
def test_sharing_changes_no_answer_and_no_book(options, size, chunk):
    lm = bind(**options)
    assert lm.shareable
    shared, books = answered(lm, size, chunk=chunk)
    lm = bind(**options)
    lm.shareable = False
    alone, plain = answered(lm, 1, chunk=chunk)
    assert shared == alone
    reused = books.pop("reused_tokens")
    assert reused > 2 * len(STORY)
    if size == 1:  # no padding to book
        for name in ("tokens", "encoded", "code_bytes", "exact_bytes", "coded_values", "slot_values"):
            assert books[name] == plain[name], name
    assert books["tokens"] == plain["tokens"]


def test_keys_before_rope_are_shared_too():
    make = [(Lossy(space="pre"), Lossy()) for _ in range(2)]
    found = []
    for shareable in (True, False):
        lm = bind()
        lm = LM(lm.model, lm.tokenizer, "tiny", make)
        lm.shareable = shareable
        found.append(answered(lm)[0])
    assert found[0] == found[1]


def test_every_shared_token_is_encoded_once():
    lm = bind(Spy)
    answered(lm, 2)
    common = batches.together(prompts(lm))[0][0]
    for codec in (codec for pair in lm.codecs for codec in pair):
        read = [x.shape[0] * x.shape[2] for x in codec.seen]
        assert read.count(common) == 1
        rest = sum(len(p) - common for p in prompts(lm)[:4])
        assert sum(read) < common + rest + len(prompts(lm)[4]) + 5 * 12 + 2 * 2 * len(ASKED[1]), "the beginning was read again"


@pytest.mark.parametrize("options", [{"window": 16}, {"make": lambda: Lossy(block=4)}, {"make": lambda: Lossy(stateful=True)}])
def test_nothing_is_shared_where_codes_depend_on_what_follows(options):
    lm = bind(**options)
    assert not lm.shareable
    assert "reused_tokens" not in answered(lm)[1]


def test_a_fork_leaves_its_origin_alone():
    lm = bind()
    ids = prompts(lm)[0]
    first = lm.begin(ids[:100], 1)
    origin = lm._beginning[1]
    before = [stream.read().clone() for layer in origin.layers for stream in layer.streams]
    lm.model(torch.tensor([ids[100:]]), past_key_values=first)
    assert first.get_seq_length() == len(ids) and origin.get_seq_length() == 100
    assert all(torch.equal(a, b) for a, b in zip(before, (stream.read() for layer in origin.layers for stream in layer.streams)))
    again = lm.begin(ids[:110], 2)
    assert again.get_seq_length() == 100, "most of it is there: not read again"
    assert lm.begin(ids[:50], 2).get_seq_length() == 50


CHOICES = [" red and round", " blue", " b", " nothing of the kind"]


def likelihoods(lm, size=4):
    requests = [Instance("loglikelihood", {}, (f"{STORY}\n{question}", choice), i) for question in ASKED for i, choice in enumerate(CHOICES)]
    return CachedLM(lm, size).loglikelihood(requests, disable_tqdm=True), lm.usage()


@pytest.mark.parametrize("options", [{}, {"sink": 4}, {"memo": False}])
def test_choices_share_their_context(options):
    lm = bind(**options)
    shared, books = likelihoods(lm)
    lm = bind(**options)
    lm.shareable = False
    alone, plain = likelihoods(lm, 1)
    assert [greedy for _, greedy in shared] == [greedy for _, greedy in alone]
    assert [x for x, _ in shared] == pytest.approx([x for x, _ in alone], abs=1e-4)
    assert books["reused_tokens"] > 10 * len(STORY)
    assert (books["tokens"], books["encoded"]) == (plain["tokens"], plain["encoded"])
    lossless = likelihoods(bind(Exact))[0]
    assert max(abs(a - b) for (a, _), (b, _) in zip(shared, lossless)) > 1e-2, "the codec must matter"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.1), (torch.bfloat16, 0.6)])
def test_half_precision_moves_likelihoods_by_rounding_only(dtype, tolerance):
    found = []
    for shareable, size in ((True, 4), (False, 1)):
        tiny = TinyLM(max_length=2048)
        tiny.model.set_attn_implementation("kvq")
        lm = LM(tiny.model.to(dtype), tiny.tokenizer, "tiny", pairs(tiny.model, Exact))
        lm.shareable = shareable
        found.append([x for x, _ in likelihoods(lm, size)[0]])
    assert found[0] == pytest.approx(found[1], abs=tolerance) and max(map(abs, found[0])) > 10 * tolerance


def test_few_shot_prefixes_are_read_once_in_generation():
    lm, alone = bind(), bind()
    alone.shareable = False
    requests = [Instance("generate_until", {}, (f"{STORY}\n{q}", {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}), i) for i, q in enumerate(ASKED)]
    together, apart = (CachedLM(each, size).generate_until(requests, disable_tqdm=True) for each, size in ((lm, 4), (alone, 1)))
    assert together == apart and lm.usage()["reused_tokens"] > 2 * len(STORY)


def test_questions_on_one_document(tmp_path):
    rows = [{"input": q, "context": STORY * 3, "answers": ["red"], "all_classes": None, "_id": str(i)} for i, q in enumerate(ASKED)]
    (tmp_path / "qasper.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for size, shareable in ((3, True), (1, False)):
        lm = bind()
        lm.shareable = shareable
        task = LongBench(data=str(tmp_path), max_new_tokens=12, batch_size=size)
        found.append({r["id"]: r for r in task.run(lm, task.examples(lm))})
        assert (lm.usage().get("reused_tokens", 0) > 2 * len(STORY)) == shareable
    assert found[0] == found[1]


def test_repeats_of_a_problem_share_its_prompt(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"problem": STORY, "answer": 1}) + "\n")
    found = []
    for size, shareable in ((3, True), (1, False)):
        lm = bind()
        lm.shareable = shareable
        task = AIME(data=str(tmp_path), repeats=3, max_new_tokens=12, batch_size=size)
        found.append({r["id"]: r for r in task.run(lm, task.examples(lm))})
        assert (lm.usage().get("reused_tokens", 0) > len(STORY)) == shareable
    assert found[0] == found[1] and len({r["prediction"] for r in found[0].values()}) == 3


class Small:
    """An LM whose device holds at most `rows` rows."""

    def __init__(self, rows):
        self.rows, self.calls, self.dropped, self.booked = rows, [], 0, 0
        self.model, self.device = TinyLM().model, torch.device("cpu")

    def book(self, name, amount):
        self.booked += amount

    def drop(self):
        self.dropped += 1

    def work(self, batch, rows):
        self.calls.append(len(batch))
        if len(batch) > self.rows:
            raise torch.OutOfMemoryError("no room")
        return [2 * x for x in batch]


def test_an_automatic_batch_halves_until_it_fits(monkeypatch):
    monkeypatch.setattr(batches, "free_bytes", lambda device: 1 << 40)
    lm = Small(5)
    assert list(batches.run(lm, list(range(20)), "auto", lm.work, lambda x: 10)) == [(x, 2 * x) for x in range(20)]
    assert lm.calls == [20, 10, 5, 5, 5, 5] and lm.dropped == 2 and lm.booked == 4


def test_what_does_not_fit_is_refused():
    for size, rows, words in ((8, 5, "8 x 10 tokens do not fit in memory: set task.batch_size=auto"), ("auto", 0, "1 x 10 tokens do not fit in memory: set task.chunk")):
        lm = Small(rows)
        with pytest.raises(Refusal, match=words):
            list(batches.run(lm, list(range(20)), size, lm.work, lambda x: 10))
    lm = Small(5)
    with pytest.raises(ValueError, match="other"):
        list(batches.run(lm, [1], "auto", lambda batch, rows: (_ for _ in ()).throw(ValueError("other")), lambda x: 10))


def test_the_estimate_follows_memory_and_length(monkeypatch):
    lm = bind()
    for free, tokens, prefill, logits in ((1 << 28, 512, None, 1), (1 << 30, 2048, None, 1), (1 << 30, 2048, 256, 1), (1 << 30, 2048, None, 0)):
        monkeypatch.setattr(batches, "free_bytes", lambda device, free=free: free)
        rows = batches.estimate(lm, tokens, prefill, logits)
        assert 1 <= rows <= batches.LARGEST
        assert batches.estimate(lm, 2 * tokens, prefill, logits) <= rows
        monkeypatch.setattr(batches, "free_bytes", lambda device, free=free: free // 8)
        assert batches.estimate(lm, tokens, prefill, logits) <= max(rows // 4, 1)
    monkeypatch.setattr(batches, "free_bytes", lambda device: 0)
    assert batches.estimate(lm, 1000) == 1
    monkeypatch.undo()
    assert batches.free_bytes(torch.device("cpu")) > 1 << 20


def test_automatic_batches_answer_like_single_ones():
    assert answered(bind(), "auto")[0] == answered(bind(), 1)[0]


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "all"])
def test_bad_sizes_are_refused(size):
    with pytest.raises(Refusal, match="or auto"):
        batches.check(size)


def test_padding_goes_behind_what_is_shared():
    from kvq.models import padding_behind

    ids, mask = left_pad([[1, 2, 3, 4], [1, 2, 9]], 0)
    ids, mask = padding_behind(ids, mask, 2)
    assert ids.tolist() == [[1, 2, 3, 4], [1, 2, 0, 9]] and mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 1]]
