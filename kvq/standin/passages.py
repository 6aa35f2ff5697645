"""Numbered paragraphs: which one an abstract (its first sentence) is from, and how many different ones there are."""

from random import Random

from kvq.standin.templates import TEMPLATES


def _bodies(rng: Random, filler, total: int, tokens: int) -> list[tuple[str, str]]:
    """(first sentence, paragraph) pairs, ``total`` of them, together about ``tokens`` tokens, no first sentence twice."""
    share, made = tokens / total - 6, {}
    while len(made) < total:
        lead = filler.sentence(rng, min(40, max(14, int(share))))
        made[lead] = " ".join([lead, *filler.run(rng, int(share) - filler.count(lead))])
    return list(made.items())


def _numbered(paragraphs: list[str]) -> str:
    return "\n\n".join(f"Paragraph {index + 1}: {text}" for index, text in enumerate(paragraphs))


def retrieval(rng: Random, filler, tokens: int, paragraphs: int | None = None) -> dict:
    """Which paragraph holds the abstract. At most 30 paragraphs, fewer in a short context."""
    rest = tokens - filler.count(TEMPLATES["passage_retrieval_en"]) - 45
    most = min(30, rest // 34)
    made = _bodies(rng, filler, paragraphs or most, rest)
    index = rng.randrange(len(made))
    return {"context": _numbered([body for _, body in made]), "input": made[index][0], "answers": [f"Paragraph {index + 1}"], "all_classes": None,
            "leads": [lead for lead, _ in made]}


def counting(rng: Random, filler, tokens: int) -> dict:
    """How many different paragraphs there are: 2 to 8, and up to 3 copies of some of them."""
    rest = tokens - filler.count(TEMPLATES["passage_count"]) - 12
    copies = rng.randint(0, 3)
    unique = rng.randint(2, max(2, min(8, rest // 30 - copies)))
    bodies = [body for _, body in _bodies(rng, filler, unique, rest * unique // (unique + copies))]
    shown = bodies + rng.choices(bodies, k=copies)
    rng.shuffle(shown)
    return {"context": _numbered(shown), "input": "", "answers": [str(unique)], "all_classes": None}
