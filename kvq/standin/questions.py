"""Questions on one document: facts hidden in running text, asked by another wording; some are yes/no, some cannot be answered."""

from random import Random

from kvq.standin import lexicon
from kvq.standin.templates import TEMPLATES

STATE = ("The {a} of {e} is {v}.", "{e} has {v} as its {a}.", "For {e}, the {a} is {v}.", "Records list {v} as the {a} of {e}.", "The {a} of {e} was set to {v}.")
ASK = ("What is the {a} of {e}?", "Which {a} does {e} have?", "What did the text give as the {a} of {e}?", "Tell the {a} of {e}.")


def facts(rng: Random, count: int) -> list[tuple[str, str, str]]:
    """Facts (name, attribute, value) in which names and attributes recur, so that neither alone tells the answer."""
    names = lexicon.different(rng, lexicon.entity, max(2, count // 2))
    attributes = rng.sample(list(lexicon.ATTRIBUTES), min(len(lexicon.ATTRIBUTES), max(2, count // 2)))
    chosen = dict.fromkeys((rng.choice(names), rng.choice(attributes)) for _ in range(2 * count))
    return [(name, attribute, lexicon.value(rng, attribute)) for name, attribute in list(chosen)[:count]]


def _hide(rng: Random, filler, stated: list[tuple[str, str, str]], tokens: int) -> str:
    """Running text with each fact either a paragraph of its own or the beginning or end of one."""
    texts = [rng.choice(STATE).format(e=name, a=attribute, v=value) for name, attribute, value in stated]
    paragraphs = filler.take(rng, tokens - sum(filler.count(text) + 2 for text in texts))
    for text in texts:
        place = rng.randint(0, len(paragraphs))
        if paragraphs and place < len(paragraphs) and rng.random() < 0.5:
            paragraphs[place] = f"{text} {paragraphs[place]}" if rng.random() < 0.5 else f"{paragraphs[place]} {text}"
        else:
            paragraphs.insert(place, text)
    return "\n\n".join(paragraphs)


def _sheet(rng: Random, tokens: int) -> list[tuple[str, str, str]]:
    stated = facts(rng, rng.randint(2, max(2, min(12, tokens // 90))))
    rng.shuffle(stated)
    return stated


def reading(rng: Random, filler, tokens: int) -> dict:
    """Extraction (multifieldqa_en): one of the facts is asked for."""
    rest = tokens - filler.count(TEMPLATES["multifieldqa_en"]) - 28
    stated = _sheet(rng, rest)
    name, attribute, value = rng.choice(stated)
    return {"context": _hide(rng, filler, stated, rest), "input": rng.choice(ASK).format(a=attribute, e=name), "answers": [value], "all_classes": None}


def article(rng: Random, filler, tokens: int) -> dict:
    """Extraction with yes/no questions and unanswerable ones (qasper), about one in eight each."""
    rest = tokens - filler.count(TEMPLATES["qasper"]) - 36
    stated = _sheet(rng, rest)
    name, attribute, value = rng.choice(stated)
    form, question = rng.random(), rng.choice(ASK)
    if form < 0.12:
        name, value = lexicon.entity(rng), "unanswerable"
    elif form < 0.25:
        claimed, right = lexicon.value(rng, attribute), rng.random() < 0.5
        question, value = f"Is {value if right else claimed} the {attribute} of {{e}}?", "yes" if right or claimed == value else "no"
    return {"context": _hide(rng, filler, stated, rest), "input": question.format(a=attribute, e=name), "answers": [value], "all_classes": None}
