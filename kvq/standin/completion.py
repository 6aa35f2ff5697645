"""The next line of code from real sources: in one file (lcc), or with an earlier part shown apart from the last lines (repobench-p)."""

import re
from random import Random

from kvq.standin.templates import TEMPLATES

NAME = re.compile(r"[A-Za-z_]\w{2,}")
MARKS = ("#", "`", "//", '"""', "'''")


def _askable(line: str, known: set[str]) -> bool:
    """A line of code that can be told from what is shown: no comment, 12 to 70 characters, all its names known."""
    text = line.strip()
    names = NAME.findall(text)
    return 12 <= len(text) <= 70 and not any(mark in text for mark in MARKS) and bool(names) and known.issuperset(names) and text[0].isalpha()


def _cut(rng: Random, filler, tokens: int) -> tuple[list[str], str]:
    """Lines of a source of at most ``tokens`` tokens that end before an askable line, and that line."""
    for _ in range(50):
        lines = rng.choice(filler.code).split("\n")
        if len(lines) < 12:
            continue
        at = rng.randrange(10, len(lines))
        shown, left = [], tokens
        for line in reversed(lines[max(0, at - 1200):at]):
            left -= len(line) // 3 + 2 if tokens > 3000 else filler.count(line + "\n")
            if left < 0:
                break
            shown.append(line)
        shown.reverse()
        known = set(NAME.findall("\n".join(shown)))
        for line in lines[at:at + 12]:
            if _askable(line, known) and len(shown) >= 4:
                return shown, line
            shown = [*shown[1:], line]
            known.update(NAME.findall(line))
    return ["def double(value):", "    result = value * 2"], "    return result"


def single(rng: Random, filler, tokens: int) -> dict:
    """One file up to a line (lcc), after others if it is short."""
    rest = tokens - filler.count(TEMPLATES["lcc"]) - 24
    shown, line = _cut(rng, filler, rest)
    left = rest - filler.count("\n".join(shown))
    before = filler.source(rng, left) + "\n\n" if left > 100 else ""
    return {"context": before + "\n".join(shown) + "\n", "input": "", "answers": [line], "all_classes": None}


def repository(rng: Random, filler, tokens: int) -> dict:
    """The last 12 to 24 lines as the question, what stood before them as another file's, unrelated code around it (repobench-p)."""
    rest = tokens - filler.count(TEMPLATES["repobench-p"]) - 60
    shown, line = _cut(rng, filler, rest * 2 // 3)
    last = rng.randint(12, 24)
    other = filler.source(rng, rest - filler.count("\n".join(shown)))
    parts = ["# Path: module.py\n" + "\n".join(shown[:-last]), "# Path: other.py\n" + other]
    rng.shuffle(parts)
    return {"context": "\n\n".join(parts) + "\n\n# Path: main.py\n", "input": "\n".join(shown[-last:]) + "\n", "answers": [line], "all_classes": None}
