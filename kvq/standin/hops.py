"""Questions over several passages: the first passage names what the second one answers (hotpotqa, 2wikimqa)."""

from random import Random

from kvq.standin import lexicon
from kvq.standin.templates import TEMPLATES

PEOPLE = ("founder", "director", "chief engineer", "editor", "sponsor", "auditor")
PERSONAL = {"birthplace": "place", "residence": "place", "hobby": "word", "employee number": "number", "favorite color": "word", "school": "place"}
FIRM = ("owner", "supplier", "parent company", "main rival", "partner")
FIRM_FACTS = ("budget", "headquarters", "emblem", "home port", "main product", "serial number")


def _value(rng: Random, sort: str) -> str:
    return {"number": lexicon.number, "place": lexicon.place, "word": lexicon.word}[sort](rng)


def _chain(rng: Random, through_people: bool) -> tuple[str, str, str, str, str]:
    """(start, link, middle, attribute, value): the link of start is middle, the attribute of middle is value."""
    if through_people:
        attribute = rng.choice(list(PERSONAL))
        return lexicon.entity(rng), rng.choice(PEOPLE), lexicon.person(rng), attribute, _value(rng, PERSONAL[attribute])
    attribute = rng.choice(FIRM_FACTS)
    return lexicon.entity(rng), rng.choice(FIRM), lexicon.syllables(rng, 3), attribute, lexicon.value(rng, attribute)


def _passages(rng: Random, filler, chains: list, tokens: int) -> str:
    """Numbered passages, one for each fact, in random order, filled up to the length with running text."""
    titles = [(start, f"The {link} of {start} is {middle}.") for start, link, middle, _, _ in chains]
    titles += [(middle, f"The {attribute} of {middle} is {value}.") for _, _, middle, attribute, value in chains]
    rng.shuffle(titles)
    share = tokens // len(titles)
    made = []
    for index, (title, text) in enumerate(titles):
        head = f"Passage {index + 1}:\n{title}\n"
        more = filler.run(rng, share - filler.count(head + text) - 3)
        more.insert(rng.choice((0, 0, len(more))), text)
        made.append(head + " ".join(more))
    return "\n\n".join(made)


def _count(rng: Random, tokens: int) -> int:
    return rng.randint(2, max(2, min(8, tokens // 110)))


def bridge(rng: Random, filler, tokens: int) -> dict:
    """Two hops through a person (hotpotqa)."""
    rest = tokens - filler.count(TEMPLATES["hotpotqa"]) - 34
    chains = [_chain(rng, True) for _ in range(_count(rng, rest))]
    start, link, _, attribute, value = chains[0]
    return {"context": _passages(rng, filler, chains, rest), "input": f"What is the {attribute} of the {link} of {start}?", "answers": [value], "all_classes": None}


def compositional(rng: Random, filler, tokens: int) -> dict:
    """Two hops through a company, or one of its halves asked for alone (2wikimqa)."""
    rest = tokens - filler.count(TEMPLATES["2wikimqa"]) - 34
    chains = [_chain(rng, False) for _ in range(_count(rng, rest))]
    start, link, middle, attribute, value = chains[0]
    if rng.random() < 0.2:
        question, value = f"Which company is the {link} of {start}?", middle
    else:
        question = f"What is the {attribute} of the company that is the {link} of {start}?"
    return {"context": _passages(rng, filler, chains, rest), "input": question, "answers": [value], "all_classes": None}
