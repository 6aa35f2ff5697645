"""Perplexity: windows, the exact path against plain transformers on real text, streaming, weights, refusals."""

import functools
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvq import models, statistics
from kvq.baselines.fp16 import FP16
from kvq.errors import Refusal
from kvq.models import LM
from kvq.tasks.perplexity import Perplexity, compare, windows
from tests.kvq.codecs import Exact, Lossy

FILE = str(Path(__file__).resolve().parents[2] / "LICENSE")
SHARED = Path(os.environ.get("KVQ_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is absent; set KVQ_SHARED_DATA to the folder with the real test inputs")
    return SHARED / name


@functools.cache
def wikitext():
    """A file with the first 40,000 characters of WikiText-2's test set: tokenizing all of it takes seconds."""
    file = Path(tempfile.mkdtemp()) / "wikitext.raw"
    file.write_text(shared("wikitext2_test.raw").read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    return str(file)


def bind(make, dtype="float32", **options):
    """An LM on the small story model whose every layer uses codecs from `make`; its reference keeps exact tensors."""
    model, tokenizer = models.load(str(shared("models/stories260K")), dtype=dtype, device="cpu")

    def pairs(build):
        return [(build(), build()) for _ in range(model.config.num_hidden_layers)]

    return LM(model, tokenizer, "stories", pairs(make), reference=LM(model, tokenizer, "stories", pairs(Exact)), **options)


def fp16():
    codec = FP16(16)
    codec.shape = torch.tensor([4, 8])
    return codec


def run(lm, **options):
    task = Perplexity(**{"data": wikitext(), "limit": 4, "subsets": None, "context": 128, **options})
    task.check()
    return task, list(task.run(lm, task.examples(lm)))


def mean(records, metric="loss"):
    table = statistics.summarize(records)
    return table[table.metric == metric].value.iloc[0]


@torch.no_grad()
def plain(limit, context, stride, dtype="float32"):
    """Mean loss per scored token by transformers alone: the guide's loop, with the library's own loss and cache."""
    folder = shared("models/stories260K")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    text = Path(wikitext()).read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids
    total = count = scored = 0
    for begin in range(0, limit * (stride or context), stride or context):
        end = min(begin + context, ids.shape[1])
        row = ids[:, begin:end]
        labels = row.clone()
        labels[:, : -(end - scored)] = -100
        tokens = int((labels[:, 1:] != -100).sum())
        logits = model(row, past_key_values=DynamicCache(config=model.config)).logits.float()
        total += float(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)) * tokens
        count, scored = count + tokens, end
    return total / count


@pytest.mark.parametrize("length, context, stride", [(1000, 64, None), (1000, 64, 16), (1000, 64, 63), (70, 64, 7), (64, 64, 8), (30, 64, 8), (999, 100, 100 // 3)])
def test_every_token_is_scored_once(length, context, stride):
    scored = [start + i for start, end, first in windows(length, context, stride) for i in range(first, end - start)]
    assert len(scored) == len(set(scored)) and all(end - start <= context for start, end, _ in windows(length, context, stride))
    assert stride is None or scored == list(range(1, length))


def test_side_by_side_windows_drop_the_rest_of_the_text():
    assert windows(130, 64, None) == [(0, 64, 1), (64, 128, 1)] and windows(63, 64, None) == []


@pytest.mark.parametrize("stride", [None, 32])
def test_exact_cache_equals_plain_transformers(stride):
    """An exact codec in float32, and the fp16 quantizer when the model itself computes in float16: both hold what the model made."""
    _, records = run(bind(Exact), stride=stride, batch_size=2)
    assert mean(records) == pytest.approx(plain(4, 128, stride), abs=1e-5)
    _, half = run(bind(fp16, "float16"), stride=stride)
    assert mean(half) == pytest.approx(plain(4, 128, stride, "float16"), abs=1e-4)
    task, records = run(bind(fp16, "float16"), stride=stride and 256, context=512)
    assert task.derived(records)[0]["value"] == pytest.approx(math.exp(plain(4, 512, stride and 256, "float16")), rel=1e-4)


def test_fp16_of_a_float32_model_rounds_the_cache_only():
    _, records = run(bind(fp16))
    assert mean(records) == pytest.approx(plain(4, 128, None), abs=1e-3)
    assert 0 < mean(records, "kl") < 1e-4


def test_streaming_equals_one_pass_without_window_or_blocks():
    one, streamed = (run(bind(Lossy), limit=2, context=64, streamed=s)[1] for s in (False, True))
    for a, b in zip(one, streamed, strict=True):
        assert a["metrics"] == pytest.approx(b["metrics"], abs=1e-5)


def test_streaming_keeps_the_window_exact_and_one_pass_does_not():
    one, streamed = (run(bind(Lossy, window=32), limit=2, context=64, streamed=s)[1] for s in (False, True))
    assert mean(streamed, "kl") < mean(one, "kl") / 2
    whole = run(bind(Lossy, window=64), limit=2, context=64, streamed=True)[1]
    assert mean(whole, "kl") == pytest.approx(0, abs=1e-7)


def test_batches_change_nothing():
    one, three = (run(bind(Lossy), limit=None, context=64, stride=60, data=b, batch_size=n)[1] for n, b in ((1, FILE), (3, FILE)))
    assert [r["id"] for r in one] == [r["id"] for r in three]
    assert len({r["weight"] for r in one}) > 1, "the last window is shorter"
    for a, b in zip(one, three):
        assert a["metrics"] == pytest.approx(b["metrics"], abs=1e-5)


def test_mean_is_over_tokens_and_perplexity_is_its_exponential():
    task, records = run(bind(Exact), limit=3, context=64, stride=16)
    assert [r["weight"] for r in records] == [63, 16, 16]
    loss = sum(r["metrics"]["loss"] * r["weight"] for r in records) / 95
    row = task.derived(records)[0]
    assert row["metric"] == "perplexity" and row["value"] == pytest.approx(math.exp(loss)) and row["n"] == 3
    assert records[0]["chance"] == pytest.approx(math.log(512))


def test_coarse_codes_cost_loss():
    _, exact = run(bind(Exact))
    _, lossy = run(bind(Lossy))
    assert mean(exact, "top1") == 1 and mean(lossy, "top1") < 1 and mean(lossy, "kl") > 1e-3


def test_compare_scores_only_new_tokens():
    torch.manual_seed(0)
    logits, ids = torch.randn(10, 7), torch.randint(7, (10,))
    expected = torch.nn.functional.cross_entropy(logits[5:9], ids[6:])
    assert compare(logits, logits, ids, first=6) == pytest.approx({"loss": float(expected), "top1": 1.0, "kl": 0.0}, abs=1e-6)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"stride": 128}, "must be below task.context"),
        ({"stride": 0}, "task.stride=0"),
        ({"limit": 0}, "task.limit=0"),
        ({"context": 1}, "task.context=1"),
        ({"streamed": "yes"}, "task.streamed=yes"),
        ({"subsets": ["a"]}, "no subsets"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(Refusal, match=words):
        Perplexity(**{"data": "embedded", "limit": 4, "subsets": None, "context": 128, **options})


def test_missing_text_is_refused_before_a_model_is_loaded():
    with pytest.raises(Refusal, match="no text"):
        Perplexity(data="/no/such/file", limit=1, subsets=None, context=64).check()


def test_short_text_and_long_context_are_refused():
    lm = bind(Exact)
    with pytest.raises(Refusal, match="windows of 512"):
        Perplexity(data=FILE, limit=50, subsets=None, context=512).examples(lm)
    with pytest.raises(Refusal, match="longer than"):
        Perplexity(data=FILE, limit=1, subsets=None, context=1024).examples(lm)
