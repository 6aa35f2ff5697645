"""A stand-in for kvq.models.LM: a tiny random Llama with a byte tokenizer and transformers' own cache."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_tokenizer(specials=("<s>", "</s>", "<pad>")) -> PreTrainedTokenizerFast:
    """One token per byte, `<s>` in front."""
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=[s for s in specials if s not in ("<s>", "</s>", "<pad>")],
    )


class TinyLM:
    """The attributes of kvq.models.LM that tasks use; `caches` counts the caches handed out."""

    def __init__(self, model=None, tokenizer=None, max_length: int = 512, specials=("<s>", "</s>", "<pad>"), seed: int = 0):
        self.tokenizer = tokenizer or byte_tokenizer(specials)
        if model is None:
            torch.manual_seed(seed)
            config = LlamaConfig(
                vocab_size=len(self.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=max_length, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.5,
            )
            model = LlamaForCausalLM(config)
        self.model, self.max_length, self.name, self.caches, self.widths = model.eval(), max_length, "tiny", [], []
        self.spent = {}

    shareable = False  # transformers' own cache cannot be forked

    def book(self, name, amount):
        self.spent[name] = self.spent.get(name, 0) + amount

    def drop(self):
        self.caches.clear()

    @property
    def device(self):
        return self.model.device

    @property
    def reference(self):
        return self

    def new_cache(self):
        self.caches.append(DynamicCache(config=self.model.config))
        return self.caches[-1]

    @torch.no_grad()
    def generate(self, ids, mask, max_new_tokens, stop_ids, chunk=None, shared=0, **sampling):
        self.widths.append(tuple(ids.shape))
        sampling.setdefault("do_sample", False)
        out = self.model.generate(
            ids, attention_mask=mask, past_key_values=self.new_cache(), max_new_tokens=max_new_tokens, eos_token_id=stop_ids,
            pad_token_id=stop_ids[0], prefill_chunk_size=chunk, **sampling,
        )
        return out[:, ids.shape[1] :]


class ZeroedLM(TinyLM):
    """Keys and values replaced by zeros: any task that truly reads the cache must change its answer."""

    def new_cache(self):
        cache = super().new_cache()
        update = cache.update
        cache.update = lambda k, v, *args, **kwargs: tuple(torch.zeros_like(x) for x in update(k, v, *args, **kwargs))
        return cache
