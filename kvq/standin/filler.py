"""Text to hide things in: paragraphs of real prose with known token counts."""

from collections.abc import Callable, Sequence
from functools import cache
from random import Random

from kvq.standin import corpus, prose

LONGEST = 600
STYLES = ("shuffled", "shuffled", "run", "repeated")


def count(tokenizer) -> Callable[[str], int]:
    """A function that counts a text's tokens, special tokens left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return lambda text: len(backend.encode(text, add_special_tokens=False).ids)


def pieces(texts: Sequence[str]) -> list[str]:
    """Paragraphs of the texts, the long ones cut at sentence ends."""
    found = []
    for text in texts:
        for paragraph in text.strip().split("\n\n"):
            part = ""
            for sentence in prose.SENTENCE.split(paragraph.replace("\n", " ")):
                if part and len(part) + len(sentence) > LONGEST:
                    found.append(part)
                    part = ""
                part = f"{part} {sentence}".strip()
            found.append(part)
    return [paragraph for paragraph in dict.fromkeys(found) if 60 <= len(paragraph) <= 2 * LONGEST]


class Filler:
    """Paragraphs in their order, their token counts, and the sentences and code among them."""

    def __init__(self, paragraphs: Sequence[str], code: Sequence[str], counter: Callable[[str], int]):
        self.paragraphs, self.code, self.count = paragraphs, code, counter
        self.sentences = [sentence for paragraph in paragraphs for sentence in prose.sentences(paragraph) if sentence.count(" ") >= 6]
        self.sizes, self.lengths = [counter(text) for text in paragraphs], [counter(" " + text) for text in self.sentences]

    def take(self, rng: Random, tokens: int, style: str | None = None) -> list[str]:
        """Paragraphs of at most ``tokens`` tokens in all, blank lines between them counted: shuffled, as they stood, or a few over and over."""
        style = style or rng.choice(STYLES)
        total, start = len(self.paragraphs), rng.randrange(len(self.paragraphs))
        few = [rng.randrange(total) for _ in range(rng.randint(6, 24))]
        taken: list[str] = []
        misses = 0
        while misses < 8:
            index = rng.randrange(total) if style == "shuffled" else (start + len(taken) + misses) % total if style == "run" else rng.choice(few)
            size = self.sizes[index] + 1
            if size > tokens:
                misses += 1
                continue
            taken.append(self.paragraphs[index])
            tokens -= size
        return taken

    def sentence(self, rng: Random, tokens: int = 30) -> str:
        """One sentence of at most ``tokens`` tokens (a longer one only if none turns up)."""
        drawn = [rng.randrange(len(self.sentences)) for _ in range(20)]
        return self.sentences[next((index for index in drawn if self.lengths[index] <= tokens), drawn[0])]

    def run(self, rng: Random, tokens: int) -> list[str]:
        """Random sentences of at most ``tokens`` tokens in all, the space before each counted."""
        taken, misses = [], 0
        while misses < 6:
            index = rng.randrange(len(self.sentences))
            if self.lengths[index] > tokens:
                misses += 1
            else:
                taken.append(self.sentences[index])
                tokens -= self.lengths[index]
        return taken

    def source(self, rng: Random, tokens: int) -> str:
        """The beginnings of code files one after the other, of about ``tokens`` tokens."""
        rows: list[str] = []
        while tokens > 0:
            for row in rng.choice(self.code).split("\n"):
                tokens -= len(row) // 3 + 2
                if tokens < 0:
                    break
                rows.append(row)
        return "\n".join(rows)


@cache
def heldout(tokenizer) -> Filler:
    """The filler of every evaluation: the fixed held-out sample."""
    return Filler(pieces(corpus.sample("heldout", "prose")), corpus.sample("heldout", "code"), count(tokenizer))


def scatter(paragraphs: list[str], inserts: Sequence[tuple[float, str]]) -> list[str]:
    """The paragraphs with each text put in as a paragraph of its own at its depth (0 = before all, 1 = after all but the last, as in the needle test)."""
    total = len(paragraphs)
    places = sorted((min(max(int(depth * total), 0), max(total - 1, 0)), order, text) for order, (depth, text) in enumerate(inserts))
    result, done = [], 0
    for index, _, text in places:
        result += paragraphs[done:index] + [text]
        done = index
    return result + paragraphs[done:]
