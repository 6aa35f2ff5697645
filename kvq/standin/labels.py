"""Few-shot tasks: a class read off earlier examples (trec), and questions on short passages answered as shown (triviaqa)."""

from random import Random

from kvq.standin import lexicon
from kvq.standin.templates import TEMPLATES

CLASSES = tuple("""Abbreviation Expression Animal Body Color Invention Currency Disease Event Food Instrument Language Letter Plant Product Religion Sport
Substance Symbol Technique Equivalent Vehicle Word Definition Description Manner Reason Group Individual Title City Country Mountain State Code Count Date
Distance Money Order Period Percent Speed Temperature Size Weight""".split())
QUESTIONS = ("What is the {c} ?", "Where can one find a {c} ?", "Who made the first {c} ?", "How does a {c} work ?", "Why is it called a {c} ?",
             "Name a famous {c} .", "How many kinds of {c} are there ?")
ASK = ("What is the {a} of {e}?", "Which {a} does {e} have?", "Who or what is the {a} of {e}?")


def typing(rng: Random, filler, tokens: int) -> dict:
    """A question about a thing whose class earlier questions about the same thing have shown; every thing has one class per document."""
    rest = tokens - filler.count(TEMPLATES["trec"]) - 16
    total = max(2, rest // 18)
    things = [f"{rng.choice(lexicon.WORDS)} {rng.choice(lexicon.WORDS)}" if rng.random() < 0.5 else rng.choice(lexicon.WORDS)
              for _ in range(max(2, min(40, total // 2)))]
    things = list(dict.fromkeys(things))
    classes = {thing: rng.choice(CLASSES) for thing in things}
    examples, shown = [], []
    while rest > 0:
        thing = rng.choice(things)
        example = f"Question: {rng.choice(QUESTIONS).format(c=thing)}\nType: {classes[thing]}"
        rest -= filler.count(example) + 1
        if rest > 0 or not examples:
            examples.append(example)
            shown.append(thing)
    thing = rng.choice(shown)
    return {"context": "\n".join(examples), "input": f"Question: {rng.choice(QUESTIONS).format(c=thing)}\nType:",
            "answers": [classes[thing]], "all_classes": list(CLASSES)}


def _passage(rng: Random, filler, tokens: int) -> tuple[str, str, str]:
    """A passage with one fact in it, the question and the answer."""
    name, attribute = lexicon.entity(rng), rng.choice(list(lexicon.ATTRIBUTES))
    answer = lexicon.value(rng, attribute)
    sentences = filler.run(rng, tokens - 60)
    sentences.insert(rng.randint(0, len(sentences)), f"The {attribute} of {name} is {answer}.")
    return f"Passage:\n{' '.join(sentences)}", rng.choice(ASK).format(a=attribute, e=name), answer


def trivia(rng: Random, filler, tokens: int) -> dict:
    """One to five solved passages, then one to solve."""
    shots = rng.randint(1, 5) if tokens > 700 else 1
    share = (tokens - filler.count(TEMPLATES["triviaqa"])) // (shots + 1) - 8
    made = [_passage(rng, filler, share) for _ in range(shots + 1)]
    examples = [f"{passage}\nQuestion:\n{question}\nAnswer: {answer}\n" for passage, question, answer in made[:-1]]
    passage, question, answer = made[-1]
    return {"context": "\n".join(examples), "input": f"{passage}\nQuestion:\n{question}\nAnswer:", "answers": [answer], "all_classes": None}
