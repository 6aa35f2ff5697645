"""English out of Python sources: docstrings and long comments' worth of it, cleaned into paragraphs."""

import ast
import inspect
import re

TRIPLE = re.compile(r'^[ ]*[rRuUbBfF]{0,2}("""|\'\'\')(.*?)\1', re.DOTALL | re.MULTILINE)
FIELD = re.compile(r"^\s*(:\w+|@\w+|>>>|\.\.\.|\.\. |[-=~^*#]{3,}|\||\+-)")
WORD = re.compile(r"[A-Za-z]{2,}")
SENTENCE = re.compile(r"(?<=[.!?]) +(?=[A-Z])")
SHORTEST = 160


def is_english(paragraph: str) -> bool:
    """True for running text: mostly letters and spaces, words of usual length, a sentence end."""
    letters = sum(mark.isalpha() or mark == " " for mark in paragraph)
    words = paragraph.split()
    return (len(paragraph) >= 60 and letters >= 0.88 * len(paragraph) and len(WORD.findall(paragraph)) >= 0.6 * len(words)
            and paragraph.rstrip()[-1] in ".:!?" and not FIELD.match(paragraph) and "  " not in paragraph)


def paragraphs(text: str) -> list[str]:
    """Running-text paragraphs of a docstring, each on one line."""
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(text))
    joined = (re.sub(r"\s*\n\s*", " ", block.strip()) for block in blocks if len({len(line) - len(line.lstrip()) for line in block.split("\n")}) <= 2)
    return [paragraph for paragraph in joined if paragraph and is_english(paragraph)]


def extract(source: str) -> str:
    """The running text of a source file's docstrings, paragraphs separated by blank lines; empty if there is little."""
    found = [paragraph for match in TRIPLE.finditer(source) for paragraph in paragraphs(match[2])]
    text = "\n\n".join(dict.fromkeys(found))
    return text + "\n" if len(text) >= SHORTEST else ""


def topics(source: str) -> list[str]:
    """The documents inside pydoc_data/topics.py, the language reference that Python carries as one dictionary."""
    table = next(node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))
    texts = (value for value in ast.literal_eval(table).values())
    return [text for text in ("\n\n".join(paragraphs(text)) for text in texts) if len(text) >= SHORTEST]


def sentences(paragraph: str) -> list[str]:
    """Sentences of a paragraph, 40 to 160 characters each."""
    return [sentence for sentence in SENTENCE.split(paragraph) if 40 <= len(sentence) <= 160 and sentence[0].isupper() and sentence[-1] == "."]
