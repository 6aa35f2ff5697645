"""Summaries by extraction: the marked findings of a report (gov_report), what one speaker said on a topic (qmsum)."""

from random import Random

from kvq.standin import filler as fill
from kvq.standin import lexicon
from kvq.standin.templates import TEMPLATES

MARKS = ("Key finding:", "Main finding:", "Finding:", "In summary:")
SAID = ("On {t}, I think the following. {s}", "About {t}: {s}", "Regarding {t}, let me say this. {s}")
ASK = ("What did {p} say about {t}?", "Summarize what {p} said about {t}.", "What was the opinion of {p} on {t}?")


def report(rng: Random, filler, tokens: int) -> dict:
    """Two or three paragraphs of a long report are marked as findings; the summary is these sentences in their order."""
    rest = tokens - filler.count(TEMPLATES["gov_report"])
    found = [filler.sentence(rng, 28) for _ in range(rng.randint(2, 3) if rest > 160 else 1)]
    mark = rng.choice(MARKS)
    paragraphs = filler.take(rng, rest - sum(filler.count(text) + 8 for text in found))
    depths = sorted(rng.random() for _ in found)
    context = "\n\n".join(fill.scatter(paragraphs, [(depth, f"{mark} {text}") for depth, text in zip(depths, found)]))
    return {"context": context, "input": "", "answers": [" ".join(found)], "all_classes": None}


def meeting(rng: Random, filler, tokens: int) -> dict:
    """Turns of a meeting, a few of them opinions on topics; one speaker's opinion on one topic is asked for."""
    rest = tokens - filler.count(TEMPLATES["qmsum"]) - 30
    people = [lexicon.person(rng) for _ in range(rng.randint(3, 5))]
    topics = [f"the {rng.choice(lexicon.WORDS)} {rng.choice(lexicon.WORDS)}" for _ in range(rng.randint(2, 4))]
    pairs = list(dict.fromkeys((rng.choice(people), rng.choice(topics)) for _ in range(max(1, min(6, rest // 90)))))
    opinions = [(person, topic, " ".join(filler.sentence(rng, 26) for _ in range(rng.randint(1, 2)))) for person, topic in pairs]
    said = [f"{person}: {rng.choice(SAID).format(t=topic, s=text)}" for person, topic, text in opinions]
    rest -= sum(filler.count(text) + 1 for text in said)
    turns = [f"{rng.choice(people)}: {text}" for text in filler.take(rng, rest * 8 // 9 - 8)]
    person, topic, text = rng.choice(opinions)
    return {"context": "\n\n".join(fill.scatter(turns, [(rng.random(), line) for line in said])), "input": rng.choice(ASK).format(p=person, t=topic),
            "answers": [text], "all_classes": None}
