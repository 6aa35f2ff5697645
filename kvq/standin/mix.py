"""Calibration text in the proportions of the stand-in's own training: half running text, half task documents of training seeds."""

from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from kvq.standin import corpus, filler, lexicon, stream

TOKENIZER = Path(__file__).parent / "model" / "tokenizer.json"
STRETCH = 6000  # characters of running text between two task documents


@cache
def mixed() -> str:
    """All of the training sample with as many tokens of task documents put in, so that every few thousand tokens are half and half.

    Names, numbers and haystacks come from the training side of the generators and from the training sample; no evaluation draws on either.
    """
    backend = Tokenizer.from_file(str(TOKENIZER))

    def count(text: str) -> int:
        return len(backend.encode(text, add_special_tokens=False).ids)

    rng = lexicon.stream("train", "mixed", 0)
    haystack = filler.Filler(filler.pieces(corpus.sample("train", "prose")), corpus.sample("train", "code"), count)
    names, odds = list(stream.TASKS), list(stream.TASKS.values())
    parts, text, tasks = [], 0, 0
    for document in corpus.sample("train"):
        for start in range(0, len(document), STRETCH):
            parts.append(document[start : start + STRETCH])
            text += count(parts[-1])
            while tasks < text:
                name = rng.choices(names, odds)[0]
                parts.append("".join(prompt + answer for prompt, answer in stream.turns(name, rng, haystack, rng.randint(300, 2000))))
                tasks += count(parts[-1])
    return "\n\n".join(parts)
