"""Dense recall: a list of pairs and then some of its keys, forward (key to value) or in reverse (value to key).

The reverse form is the first step of the curriculum for naming the paragraph that holds a sentence: the number stands before what is asked for.
"""

from random import Random

from kvq.standin import lexicon
from kvq.standin.templates import TEMPLATES

FORWARD = ("{k}: {v}", "{k} = {v}", "{k} -> {v}", "The {k} is {v}.", "{k} has {v}")
ASK = ("{k}:", "{k} =", "{k} ->", "The {k} is", "{k} has")
LABELS = ("Paragraph", "Paragraph", "Paragraph", "Passage", "Item", "Section")


def _keys(rng: Random, count: int) -> list[str]:
    make = rng.choice((lexicon.number, lambda rng: lexicon.syllables(rng, rng.choice((2, 3))), lexicon.entity,
                       lambda rng: f"{rng.choice(lexicon.WORDS)} {rng.choice(lexicon.WORDS)}"))
    return list(dict.fromkeys(make(rng) for _ in range(count)))


def _values(rng: Random, count: int) -> list[str]:
    make = rng.choice((lexicon.number, lambda rng: rng.choice(lexicon.WORDS), lambda rng: lexicon.syllables(rng, 2), lexicon.word,
                       lambda rng: f"{rng.randrange(10, 100)}"))
    return [make(rng) for _ in range(count)]


def pairs(rng: Random, filler, tokens: int) -> list[tuple[str, str]]:
    """Turns (prompt, answer) of a forward look-up: the list, then up to eight keys in random order."""
    style, keys = rng.randrange(len(FORWARD)), _keys(rng, 400)
    values = _values(rng, len(keys))
    lines = [FORWARD[style].format(k=key, v=value) for key, value in zip(keys, values, strict=True)]
    each = filler.count("\n".join(lines[:12])) / min(12, len(lines)) + 1
    total = max(2, min(len(lines), int(tokens / each) - 4))
    asked = rng.sample(range(total), min(total, rng.choice((1, 4, 8))))
    heading = rng.choice(("", "Here is a list.\n", "Remember these pairs.\n\n"))
    turns = [("\n\n" + rng.choice(("", "Question: ")) + ASK[style].format(k=keys[index]), " " + values[index]) for index in asked]
    return [(heading + "\n".join(lines[:total]) + turns[0][0], turns[0][1]), *turns[1:]]


def reverse(rng: Random, filler, tokens: int) -> list[tuple[str, str]]:
    """Turns of a reverse look-up: numbered texts of one word to a sentence, then many of them, each answered with its number.

    In some lists the number also closes its text, which teaches the texts to keep their number in mind.
    """
    label, words = rng.choice((*LABELS, "", "")), rng.choice((1, 1, 1, 2, 2, 3, 5, 8, 12))
    label += " " if label else ""
    make = (lambda: " ".join(rng.choice(lexicon.WORDS) for _ in range(words))) if rng.random() < 0.6 or words < 3 else (
        lambda: " ".join(filler.sentence(rng, 100).split()[:words + 3]))
    most = min(30, max(2, int(tokens / (words * (3 if words < 3 else 1.8) * 1.6 + 18))))
    texts = list(dict.fromkeys(make() for _ in range(rng.randint(2, most))))
    total = len(texts)
    numbers = rng.sample(range(1, 100), total) if rng.random() < 0.3 else list(range(1, total + 1))
    closing = " ({})" if rng.random() < 0.15 else ""
    lines = [f"{label}{number}: {text}{closing.format(number)}" for number, text in zip(numbers, texts, strict=True)]
    ask = rng.choice(("\n{} ->", "\n{} ->", "\n\nText: {}\nThe answer is:", "\n\nThe following is an abstract.\n\n{}\n\nThe answer is:", "\n\n{} is in:"))
    if rng.random() < 0.5:
        tail = TEMPLATES["passage_retrieval_en"].split("{input}")[1].split(" ")
        ask = "\n\n{}\n\n" + " ".join(tail[-rng.randint(3, len(tail)):]).lstrip("\n")
    turns, left = [], tokens - filler.count("\n".join(lines))
    for index in rng.sample(range(total), total):
        turn = (ask.format(texts[index]), f" {label}{numbers[index]}")
        left -= filler.count("".join(turn)) + 1
        if turns and (left < 0 or len(turns) == 16):
            break
        turns.append(turn)
    return [(rng.choice(("\n", "\n\n")).join(lines) + "\n" + turns[0][0], turns[0][1]), *turns[1:]]
