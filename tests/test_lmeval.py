"""The adapter under lm-eval: same numbers as the stock HFLM on an ordinary cache, every token through the cache it was given."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from kvq.errors import Refusal
from kvq.lmeval import CachedLM, hub_dataset, hub_revision, manager, quiet
from tests.tiny_lm import TinyLM, ZeroedLM

PAIRS = [("The sky is", " blue"), ("The sky is", " b"), ("The sky is", " c"), ("One two three four", " five six"), ("A", " longer continuation"), ("A cat", " sat")]


def stock(lm, batch_size=1):
    with quiet():
        return HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, backend="causal", batch_size=batch_size, max_length=lm.max_length)


def likelihoods(adapter, pairs=PAIRS):
    return adapter.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True)


def answers(adapter, prompts, **options):
    kwargs = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, **options}
    return adapter.generate_until([Instance("generate_until", {}, (prompt, dict(kwargs)), i) for i, prompt in enumerate(prompts)], disable_tqdm=True)


@pytest.fixture(scope="module")
def lm():
    return TinyLM()


def test_likelihoods_equal_the_stock_model_to_the_last_digit(lm):
    assert likelihoods(CachedLM(lm, all_logits=True)) == likelihoods(stock(lm))


def test_fewer_logits_move_a_likelihood_by_rounding_only(lm):
    mine, theirs = likelihoods(CachedLM(lm)), likelihoods(stock(lm))
    assert [a[1] for a in mine] == [a[1] for a in theirs]
    assert [a[0] for a in mine] == pytest.approx([a[0] for a in theirs], abs=1e-5)


def test_likelihoods_do_not_depend_on_the_batch(lm):
    one, four = likelihoods(CachedLM(lm)), likelihoods(CachedLM(lm, batch_size=4))
    assert [a[1] for a in one] == [a[1] for a in four]
    assert [a[0] for a in four] == pytest.approx([a[0] for a in one], abs=1e-5)


def test_a_batch_holds_inputs_of_one_length_and_only_scored_logits(lm):
    shapes = []
    hook = lm.model.register_forward_hook(lambda _, args, kwargs, out: shapes.append((tuple(kwargs["input_ids"].shape), out.logits.shape[1])), with_kwargs=True)
    likelihoods(CachedLM(lm, batch_size=8))
    hook.remove()
    # Inputs lack their last byte and gain <s>; " b" and " c" share one forward of a single scored logit.
    lengths = {len(lm.tokenizer(context + end)["input_ids"]) - 1: len(end) for context, end in PAIRS}
    assert sorted(shapes) == sorted(((1, width), kept) for width, kept in lengths.items())


def test_rolling_likelihood_equals_the_stock_model(lm):
    text = "All happy families are alike. " * 30
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    with quiet():
        mine, theirs = (adapter.loglikelihood_rolling(requests, disable_tqdm=True) for adapter in (CachedLM(lm), stock(lm)))
    assert mine == pytest.approx(theirs, rel=1e-6)


def test_generation_equals_the_stock_model(lm):
    prompts = ["The sky", "Once upon a time", "x"]
    for batch_size in (1, 3):
        assert answers(CachedLM(lm, batch_size), prompts) == answers(stock(lm, batch_size), prompts)


def test_chunked_prefill_generates_the_same(lm):
    prompts = ["The quick brown fox jumps over the lazy dog"]
    assert answers(CachedLM(lm, chunk=16), prompts) == answers(CachedLM(lm), prompts)


def test_every_call_gets_a_fresh_cache():
    lm = TinyLM()
    likelihoods(CachedLM(lm))
    answers(CachedLM(lm), ["a", "bb"])
    assert len(lm.caches) == 7  # five distinct inputs, two prompts
    assert len({id(cache) for cache in lm.caches}) == 7
    assert all(cache.get_seq_length() > 0 for cache in lm.caches)


def test_a_zeroing_cache_changes_one_pass_scores_and_answers():
    plain, zeroed = CachedLM(TinyLM()), CachedLM(ZeroedLM())
    assert all(abs(a[0] - b[0]) > 1e-3 for a, b in zip(likelihoods(plain), likelihoods(zeroed)))
    assert answers(plain, ["The sky is"]) != answers(zeroed, ["The sky is"])


def test_requests_that_lose_tokens_are_remembered():
    adapter = CachedLM(TinyLM(max_length=32))
    with quiet():
        likelihoods(adapter, [("short", " x"), ("long " * 20, " x")])
        answers(adapter, ["b" * 40, "c"])
    assert adapter.truncated == {"long " * 20, "b" * 40}


def test_manager_knows_common_tasks_without_the_full_index():
    names = ("arc_challenge", "truthfulqa_mc2", "gsm8k", "hendrycks_math500", "niah_single_1", "ruler_vt", "winogrande", "mathqa")
    found = manager(names)
    assert set(names) <= set(found.task_index) and len(found.task_index) < 2000


def test_hub_without_network_is_refused_at_once(monkeypatch, tmp_path):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    def absent(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(Refusal, match="never downloaded here. Do this"):
        hub_revision("owner/name", "Do this.")


def test_hub_cache_serves_without_network(monkeypatch, tmp_path):
    import huggingface_hub

    snapshot = tmp_path / "0123abcd"
    (snapshot / "sub").mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nconfigs:\n- config_name: sub\n  data_files:\n  - split: test\n    path: sub/test.jsonl\n---\n")
    (snapshot / "sub" / "test.jsonl").write_text('{"question": "q"}\n')
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: (_ for _ in ()).throw(ConnectionError()))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(snapshot))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    dataset, revision = hub_dataset("owner/name", "sub", "Do this.")
    assert revision == "0123abcd" and dataset["test"][0]["question"] == "q"


def test_quiet_restores_streams_after_an_error(capsys):
    with pytest.raises(ValueError), quiet():
        print("hidden")
        raise ValueError
    print("shown")
    assert capsys.readouterr().out == "shown\n"


def test_torch_grad_is_off(lm):
    assert not CachedLM(lm)._model_call(torch.ones(1, 4, dtype=torch.long)).requires_grad


def test_seeded_draws_repeat_and_leave_no_trace():
    import random

    import numpy as np

    from kvq.lmeval import seeded

    before = random.getstate(), np.random.get_state()[1].tolist()
    draws = []
    for seed in (1, 1, 2):
        with seeded(seed):
            draws.append((random.random(), float(np.random.rand())))
    assert draws[0] == draws[1] != draws[2]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
