"""Short arithmetic with written steps, an embedded stand-in for competition problems: integer answers from 0 to 999 in \\boxed{}."""

from random import Random

from kvq.standin import lexicon

PROMPT = "Question: {problem}\nAnswer:"
OPENERS = ("Start with {}.", "A counter shows {}.", "Begin with the number {}.", "Let x be {}.")
ENDINGS = ("What is the result?", "What number is left?", "Find the final number.", "What is the final value?")
STEPS = {"+": ("Add {}.", "Increase it by {}."), "-": ("Subtract {}.", "Take away {}."), "*": ("Multiply by {}.", "Multiply the result by {}.")}


def problem(rng: Random, length: int | None = None) -> dict:
    """One chain of three to six operations on numbers from 0 to 999: {problem, answer, steps}."""
    value = rng.randint(2, 99)
    said, written = [rng.choice(OPENERS).format(value)], []
    for _ in range(length or rng.randint(3, 6)):
        allowed = [sign for sign, most in (("+", 999 - value), ("-", value), ("*", 999 // max(value, 1))) if most >= 2]
        sign = rng.choice(allowed)
        by = rng.randint(2, min(9, 999 // max(value, 1))) if sign == "*" else rng.randint(1, min(99, 999 - value if sign == "+" else value))
        result = value + by if sign == "+" else value - by if sign == "-" else value * by
        said.append(rng.choice(STEPS[sign]).format(by))
        written.append(f"{value} {sign} {by} = {result}")
        value = result
    return {"problem": f"{' '.join(said)} {rng.choice(ENDINGS)}", "answer": str(value), "steps": "\n".join(written)}


def solution(item: dict) -> str:
    """What the stand-in was trained to write behind PROMPT: the steps, a line each, and the boxed answer."""
    return f"\n{item['steps']}\nThe answer is \\boxed{{{item['answer']}}}."


def generate(n: int, seed: int) -> list[dict]:
    """n evaluation problems, each {problem, answer, steps}, all strings; ``PROMPT.format(problem=...)`` is the prompt, at most 100 new tokens the answer."""
    return [problem(lexicon.stream("eval", "arithmetic", seed, index)) for index in range(n)]


def turns(rng: Random, filler, tokens: int) -> list[tuple[str, str]]:
    """Training documents: some problems solved one after the other, up to the length."""
    made: list[tuple[str, str]] = []
    tokens = min(tokens, rng.choice((200, 400, 800)))
    while not made or tokens > 0:
        item = problem(rng)
        prompt, answer = PROMPT.format(problem=item["problem"]), solution(item)
        tokens -= filler.count(prompt + answer)
        if not made or tokens > 0:
            made.append((("\n\n" if made else "") + prompt, answer))
    return made
