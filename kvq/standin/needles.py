"""Needles in a haystack, six kinds as the Block-GTQ paper tests them (Section 12.1 of its protocol), in our own words.

single: one code at the depth. distractor: the same and two look-alike codes behind it. multi: three facts at fixed depths, the first is asked.
multikey: three facts around the depth, all are asked. multivalue: three properties of one project at fixed depths, all are asked. multiquery: a code
at the depth, a fact before and a fact behind it, all are asked. Scored by the fraction of answers found in the output, case ignored.
"""

from random import Random

from kvq.standin import filler as fill
from kvq.standin import lexicon

KINDS = ("single", "distractor", "multi", "multikey", "multivalue", "multiquery")
CODE = ("The secret {k} code for {e} is {v}.", "Remember this: the secret {k} code for {e} is {v}.", "The {k} code assigned to {e} is {v}.")
FACT = ("The {a} of {e} is {v}.", "According to the records, the {a} of {e} is {v}.", "It is known that the {a} of {e} is {v}.")
ASK_CODE = ("What is the secret {k} code for {e}?", "What is the {k} code for {e}?", "Which {k} code belongs to {e}?")
ASK_FACT = ("What is the {a} of {e}?", "What is the {a} of {e}?", "Tell me the {a} of {e}.")
OPENING = ("", "Read the following text carefully and answer the question at the end.\n\n", "The text below holds some facts. Keep them in mind.\n\n",
           "Below is a long document. A question follows it.\n\n")
ASK = ("Question: {q}\nAnswer{s}:", "Based on the text above, answer the question.\nQuestion: {q}\nAnswer{s}:", "{q}\n\nAnswer{s}:", "Q: {q}\nAnswer{s}:")


def _code(rng: Random, name: str) -> tuple[str, str, str]:
    fields = {"k": rng.choice(lexicon.KINDS), "e": name, "v": lexicon.number(rng)}
    return rng.choice(CODE).format(**fields), rng.choice(ASK_CODE).format(**fields), fields["v"]


def _fact(rng: Random, name: str, attribute: str) -> tuple[str, str, str]:
    fields = {"a": attribute, "e": name, "v": lexicon.value(rng, attribute)}
    return rng.choice(FACT).format(**fields), rng.choice(ASK_FACT).format(**fields), fields["v"]


def plan(rng: Random, kind: str, depth: float) -> tuple[list[tuple[float, str]], str, list[str]]:
    """What one prompt hides and asks: (depth, needle) pairs, the question, the answers in the order asked."""
    names = lexicon.different(rng, lexicon.entity, 3)
    attributes = rng.sample(list(lexicon.ATTRIBUTES), 3)
    if kind in ("single", "distractor"):
        codes = [_code(rng, name) for name in names[:1 if kind == "single" else 3]]
        depths = [depth, min(depth + 0.1, 0.95), min(depth + 0.2, 0.95)]
        return [(at, text) for at, (text, _, _) in zip(depths, codes)], codes[0][1], [codes[0][2]]
    if kind == "multivalue":
        facts = [_fact(rng, names[0], attribute) for attribute in attributes]
        question = f"List the {attributes[0]}, the {attributes[1]} and the {attributes[2]} of {names[0]}."
        return [(at, text) for at, (text, _, _) in zip((0.15, 0.45, 0.75), facts)], question, [answer for _, _, answer in facts]
    facts = [_fact(rng, name, attribute) for name, attribute in zip(names, attributes)]
    if kind == "multi":
        return [(at, text) for at, (text, _, _) in zip((0.2, 0.5, 0.8), facts)], facts[0][1], [facts[0][2]]
    if kind == "multikey":
        depths = [depth, depth - 0.05, depth + 0.05]
    elif kind == "multiquery":
        facts[0] = _code(rng, names[0])
        depths = [depth, depth - 0.3, depth + 0.3]
    else:
        raise ValueError(f"The needle kind is one of {', '.join(KINDS)}, not {kind!r}.")
    question = "Answer each of the three: " + " ".join(question for _, question, _ in facts)
    return [(min(max(at, 0.0), 1.0), text) for at, (text, _, _) in zip(depths, facts)], question, [answer for _, _, answer in facts]


def document(rng: Random, filler: fill.Filler, tokens: int, kind: str, depth: float) -> dict:
    """One prompt of about ``tokens`` tokens: {prompt, answers, kind, depth}."""
    inserts, question, answers = plan(rng, kind, depth)
    opening = rng.choice(OPENING)
    ask = rng.choice(ASK).format(q=question, s="s" if len(answers) > 1 else "")
    rest = tokens - filler.count(opening + ask) - sum(filler.count(text) + 1 for _, text in inserts) - 3
    paragraphs = fill.scatter(filler.take(rng, rest), inserts)
    return {"prompt": opening + "\n\n".join(paragraphs) + "\n\n" + ask, "answers": answers, "kind": kind, "depth": depth}


def fitting(make, tokens: int, length) -> dict:
    """make(tokens) with its prompt no longer than ``tokens`` by length(document): the target is lowered by the excess until it fits."""
    target = tokens
    for _ in range(12):
        made = make(target)
        excess = length(made) - tokens
        if excess <= 0:
            return made
        target -= excess + 1
    raise ValueError(f"No document of at most {tokens} tokens can be made; ask for a longer context.")


def generate(kind: str, n: int, tokens: int, depth: float, tokenizer, seed: int) -> list[dict]:
    """n prompts of at most ``tokens`` tokens, bos included, needle at ``depth`` in 0..1.

    Each is {prompt, answers, kind, depth, length}; length is the prompt's own token count. Seeds number evaluation prompts only. Raises ValueError
    for an unknown kind, a depth outside 0..1, or too few tokens to hold the needles.
    """
    if kind not in KINDS or not 0 <= depth <= 1:
        raise ValueError(f"The needle kind is one of {', '.join(KINDS)} and the depth in 0..1, not {kind!r} at {depth}.")
    haystack, made = fill.heldout(tokenizer), []
    for index in range(n):
        task = f"needles/{kind}/{tokens}/{depth}"
        one = fitting(lambda target: document(lexicon.stream("eval", task, seed, index), haystack, target, kind, depth), tokens,
                      lambda document: haystack.count(document["prompt"]) + 1)
        made.append({**one, "length": haystack.count(one["prompt"]) + 1})
    return made
