"""Multiple choice by likelihood: a few-shot cloze whose right ending an earlier line of the context has shown."""

from random import Random

from kvq.standin import lexicon

LINES = 48


def item(rng: Random, lines: int = LINES) -> dict:
    """One item: pairs of a thing and its class, three times as many lines as things, then a thing again."""
    form = rng.choice(("{k}: {v}", "{k} = {v}", "{k} -> {v}"))
    things = lexicon.different(rng, rng.choice((lambda rng: lexicon.syllables(rng, 2), lambda rng: f"{rng.choice(lexicon.WORDS)} {rng.choice(lexicon.WORDS)}")),
                               max(4, lines // 3))
    classes = rng.sample(lexicon.WORDS, 8)
    kinds = {thing: classes[index % 8] for index, thing in enumerate(things)}
    shown = things + rng.choices(things, k=max(0, lines - len(things)))
    rng.shuffle(shown)
    asked = rng.choice(shown)
    context = "\n".join(form.format(k=thing, v=kinds[thing]) for thing in shown) + "\n" + form.split("{v}")[0].format(k=asked).rstrip()
    options = [kinds[asked], *rng.sample([kind for kind in classes if kind != kinds[asked]], 3)]
    rng.shuffle(options)
    return {"context": context, "choices": options, "gold": options.index(kinds[asked])}


def generate(n: int, seed: int, lines: int = LINES) -> list[dict]:
    """n evaluation items {context, choices, gold}: four choices, scored as context + " " + choice; about ten tokens a line."""
    return [item(lexicon.stream("eval", "choices", seed, index), lines) for index in range(n)]


def turns(rng: Random, filler, tokens: int) -> list[tuple[str, str]]:
    """A training document of the same form."""
    made = item(rng, max(6, min(tokens // 12, 240)))
    return [(made["context"], " " + made["choices"][made["gold"]])]
