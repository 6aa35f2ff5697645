"""How answers are drawn: as the task says whatever the checkpoint's generation config prefers, without the logits of a prompt."""

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import GenerationConfig

from kvq.lmeval import CachedLM
from kvq.models import LM
from kvq.prompt import left_pad
from tests.kvq.codecs import Lossy, bind, pairs
from tests.tiny_lm import TinyLM

TASTE = {"repetition_penalty": 1.7, "do_sample": True, "temperature": 0.2, "top_k": 3, "min_new_tokens": 9, "no_repeat_ngram_size": 2}
PROMPTS = ["the cat and the cat and the cat and the", "one two one two one two one"]


def tasteful():
    tiny = TinyLM(max_length=512)
    tiny.model.set_attn_implementation("kvq")
    tiny.model.generation_config = GenerationConfig(**TASTE, eos_token_id=[1, 5], bos_token_id=0, pad_token_id=2)
    return tiny


def plain():
    tiny = TinyLM(max_length=512)
    tiny.model.set_attn_implementation("kvq")
    tiny.model.generation_config = GenerationConfig(eos_token_id=[1, 5], bos_token_id=0, pad_token_id=2)
    return tiny


def drawn(lm):
    ids, mask = left_pad([lm.tokenizer(text)["input_ids"] for text in PROMPTS], 2)
    rows = lm.generate(ids, mask, 24, [1]).tolist()
    requests = [Instance("generate_until", {}, (text, {"until": ["\n\n"], "max_gen_toks": 24}), i) for i, text in enumerate(PROMPTS)]
    return rows, CachedLM(lm, 2).generate_until(requests, disable_tqdm=True)


def test_a_checkpoints_taste_changes_nothing():
    found = [drawn(LM(tiny.model, tiny.tokenizer, "tiny", pairs(tiny.model, Lossy))) for tiny in (tasteful(), plain())]
    assert found[0] == found[1]
    tiny = tasteful()
    ids, mask = left_pad([tiny.tokenizer(text)["input_ids"] for text in PROMPTS], 2)
    assert tiny.generate(ids, mask, 24, [1]).tolist() != plain().generate(ids, mask, 24, [1]).tolist(), "the taste would have mattered"


def test_its_special_tokens_stay():
    tiny = tasteful()
    lm = LM(tiny.model, tiny.tokenizer, "tiny", pairs(tiny.model, Lossy))
    config = lm.model.generation_config
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == ([1, 5], 0, 2)
    assert config.repetition_penalty is None or config.repetition_penalty == 1.0


class Watch:
    """Notes how many positions enter the model and how many leave as logits."""

    def __init__(self, model):
        self.read, self.logits = [], []
        self.hooks = [
            model.base_model.register_forward_pre_hook(lambda _, args, kwargs: self.read.append(kwargs["input_ids"].shape[1]), with_kwargs=True),
            model.get_output_embeddings().register_forward_hook(lambda _, args, out: self.logits.append(out.shape[1])),
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "deepseek_v2"])
@pytest.mark.parametrize("chunk", [None, 32])
@pytest.mark.parametrize("shared", [0, 90])
def test_a_prompts_logits_are_never_computed(architecture, chunk, shared):
    lm = bind(architecture)
    if shared and not lm.shareable:
        pytest.skip(f"{architecture} has sliding layers: nothing is shared")
    ids = torch.randint(5, 300, (2, 131), generator=torch.Generator().manual_seed(0))
    ids[1, :shared] = ids[0, :shared]
    with Watch(lm.model) as watch:
        lm.generate(ids, torch.ones_like(ids), 4, [1], chunk=chunk, shared=shared)
    assert set(watch.logits) == {1}, "one position at a time"
    assert max(watch.read) <= (chunk + 1 if chunk else 131)
    assert sum(watch.read) < 131 + 10 + (0 if not shared else 1)


def test_lm_eval_generation_computes_no_prompt_logits():
    lm = bind()
    requests = [Instance("generate_until", {}, ("word " * 60, {"until": ["\n"], "max_gen_toks": 4}), 0)]
    for chunk in (None, 16):
        with Watch(lm.model) as watch:
            CachedLM(lm, chunk=chunk).generate_until(requests, disable_tqdm=True)
        assert set(watch.logits) == {1} and max(watch.read) <= (17 if chunk else 1000)


def test_likelihoods_compute_the_scored_logits_only():
    lm = bind()
    context = "word " * 120
    requests = [Instance("loglikelihood", {}, (context, end), i) for i, end in enumerate((" a", " b c d", " e f"))]
    with Watch(lm.model) as watch:
        CachedLM(lm, 4).loglikelihood(requests, disable_tqdm=True)
    longest = max(len(lm.tokenizer(context + end)["input_ids"]) - len(lm.tokenizer(context)["input_ids"]) for end in (" a", " b c d", " e f"))
    assert max(watch.logits) <= 2 * longest and sum(watch.read) < 2 * len(lm.tokenizer(context)["input_ids"])
