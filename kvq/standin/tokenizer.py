"""A byte-level BPE for the stand-in: 4,096 tokens, every digit and every run of newlines its own piece.

Pieces never cross a newline, and a space belongs to the word after it. Text may therefore be cut before a space, a newline or a digit and encoded
in parts: the parts' tokens are the whole's tokens, which is what lets documents be assembled from pieces of known length.

    python -m kvq.standin.tokenizer --out kvq/standin/model
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvq.standin import corpus, prose
from kvq.standin.templates import TEMPLATES

SIZE = 4096
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
PIECES = r"\n+|[0-9]| ?\p{L}+| ?[^\s\p{L}0-9]+|[^\S\n]+(?!\S)|[^\S\n]+|\p{N}"


def train(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Learn the merges and wrap them for transformers; a text encoded with special tokens starts with the bos token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=[BOS, EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=20, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left",
                                   model_max_length=16384, clean_up_tokenization_spaces=False)


def texts(every: int = 6) -> Iterator[str]:
    """Every n-th training source, the prose of all of them, and the prompts."""
    sources = ((path, corpus.read(where)) for path, where in corpus.files() if not corpus.held_out(path))
    for index, (_, text) in enumerate((path, text) for path, text in sources if text):
        if index % every == 0:
            yield text
        yield prose.extract(text)
    yield from itertools.chain.from_iterable([template] * 300 for template in TEMPLATES.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json and tokenizer_config.json")
    train(texts()).save_pretrained(parser.parse_args().out)


if __name__ == "__main__":
    main()
