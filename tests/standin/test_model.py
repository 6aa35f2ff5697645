"""The shipped model: small, loadable, and able to find a needle."""

import json

import pytest
import torch
from transformers import AutoConfig

from kvq.standin import evaluate, needles, score

TRACKED = 24_000_000


@pytest.fixture(scope="module")
def loaded():
    return evaluate.load(evaluate.MODEL, "cpu")


def test_size_and_shape():
    files = [path for path in evaluate.MODEL.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= TRACKED and max(path.stat().st_size for path in files) < 16 * 2**20
    config = AutoConfig.from_pretrained(evaluate.MODEL)
    assert (config.model_type, config.head_dim, config.num_key_value_heads, config.max_position_embeddings) == ("llama", 128, 2, 16384)
    index = json.loads((evaluate.MODEL / "model.safetensors.index.json").read_text())
    assert all((evaluate.MODEL / shard).exists() for shard in set(index["weight_map"].values()))


def test_tokenizer_knows_its_tokens(loaded):
    _, tokenizer = loaded
    ids = tokenizer("The code is 48213.\n\n    return x")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0 and tokenizer.eos_token_id == 1 and tokenizer.pad_token_id == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The code is 48213.\n\n    return x"
    assert [tokenizer.decode([token]) for token in ids if tokenizer.decode([token]).isdigit()] == list("48213")


@pytest.mark.parametrize("tokens", [512, 1024])
def test_needle_is_found_and_eos_follows(loaded, tokens):
    model, tokenizer = loaded
    torch.set_num_threads(1)
    made = [document for seed in range(6) for document in needles.generate("single", 1, tokens, seed / 5, tokenizer, seed)]
    said = evaluate.generate(model, tokenizer, [document["prompt"] for document in made], 16)
    assert sum(score.needle(text, document["answers"]) for text, document in zip(said, made, strict=True)) >= 5
    assert all(text.strip() in document["answers"] for text, document in zip(said, made, strict=True) if score.needle(text, document["answers"]))


def test_training_text_is_predicted(loaded):
    model, tokenizer = loaded
    loss, tokens = evaluate.text_loss(model, tokenizer, evaluate.corpus.sample("heldout")[:4], 256)
    assert tokens >= 512 and loss < 3.0
