"""Needle in a haystack, the six kinds of Block-GTQ (single, distractor, multi, multikey, multivalue, multiquery) over lengths and depths.

Every prompt of a (kind, length, depth, trial) cell is the same for all methods, so differences are paired. Score: the fraction of
answers found in the output, case ignored, in percent. The paper recycles eight paragraphs and one needle set; here needles and
haystack change with every trial, so no two prompts share a beginning. Subsets are kinds at a length (`single@2048`); a record keeps its depth for the map.
"""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

from kvq import batches, calibrate
from kvq.errors import Refusal
from kvq.prompt import stop_ids
from kvq.records import Example, Record
from kvq.taskdata import embedded_version

KINDS = ("single", "distractor", "multi", "multikey", "multivalue", "multiquery")
HUB = "hub:baber/paul_graham_essays:default:train"
CHARACTERS = 2_000_000
"""At most this much of a haystack text is read; longer prompts repeat its paragraphs."""


class NIAH:
    """data: the haystack, `embedded`, `hub` (Paul Graham's essays, as in RULER), hub:<dataset>:<config>:<split>, a text file, or a folder of .txt files.

    subsets: kinds, null for all six. lengths: prompt tokens. depths: how many, evenly spaced from 0 to 1. limit: trials per cell.
    chunk: prefill in pieces of this many tokens.
    """

    one_pass = False
    metric = "score"
    perfect = 100.0

    def __init__(
        self, data: str, limit: int, subsets: list[str] | None, context: int | None, lengths: list[int], depths: int, batch_size: int | str,
        max_new_tokens: int, chunk: int | None = None, seed: int = 0,
    ):  # fmt: skip
        unknown = [s for s in subsets or [] if s not in KINDS]
        if unknown:
            raise Refusal(f"niah has no subset {', '.join(unknown)}; choose from {', '.join(KINDS)}.")
        for name, value in (("limit", limit), ("depths", depths), ("max_new_tokens", max_new_tokens), ("chunk", 1 if chunk is None else chunk)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise Refusal(f"task.{name}={value} must be a whole number of at least 1.")
        batches.check(batch_size)
        self.data, self.limit, self.subsets = data, limit, tuple(subsets or KINDS)
        self.lengths = [context] if context else list(lengths)
        self.depths = [round(i / max(depths - 1, 1), 3) for i in range(depths)] if depths > 1 else [0.5]
        self.batch_size, self.max_new_tokens, self.chunk, self.seed = batch_size, max_new_tokens, chunk, seed

    def fits(self, max_length: int, name: str) -> None:
        """Raise Refusal if a model of `max_length` tokens is too short for a prompt and its answer."""
        if too_long := [n for n in self.lengths if n + self.max_new_tokens > max_length]:
            raise Refusal(f"task.lengths={too_long} with {self.max_new_tokens} new tokens exceeds the {max_length} tokens that {name} allows: ask for shorter ones.")

    def check(self) -> None:
        """Read the haystack before any model, and fingerprint it. Raises Refusal if there is none."""
        self.content = embedded_version("needles", "filler") if self.data == "embedded" else hashlib.sha256(text(self.data).encode()).hexdigest()[:16]

    def examples(self, lm) -> list[Example]:
        """One example per (kind, length, depth, trial): {prompt, answers, kind, depth}."""
        from kvq.standin import filler

        if self.data == "embedded":
            haystack = filler.heldout(lm.tokenizer)
        else:
            haystack = filler.Filler(filler.pieces([text(self.data)]), [], filler.count(lm.tokenizer))
            if len(haystack.paragraphs) < 8:
                raise Refusal(f"The haystack '{self.data}' has {len(haystack.paragraphs)} usable paragraphs (60 to 1,200 characters); 8 are needed.")

        self.fits(lm.max_length, lm.name)
        found = []
        for length in self.lengths:
            for kind in self.subsets:
                for at, depth in enumerate(self.depths):
                    seed = self.seed + 1000 * at + 100_000 * length
                    for trial, item in enumerate(_prompts(kind, self.limit, length, depth, haystack, seed)):
                        found.append(Example(f"{kind}/{length}/{depth}/{trial}", f"{kind}@{length}", item))
        return found

    def run(self, lm, examples: list[Example]) -> Iterator[Record]:
        """Generate greedily; yields each record as soon as its batch is done."""
        prompts = [lm.tokenizer(e.payload["prompt"], verbose=False)["input_ids"] for e in examples]
        for index, answer, _ in batches.answers(lm, prompts, self.max_new_tokens, self.batch_size, stop_ids(lm), chunk=self.chunk):
            example, item = examples[index], examples[index].payload
            text = lm.tokenizer.decode(answer, skip_special_tokens=True)
            yield {
                "id": example.id, "subset": example.subset, "metrics": {"score": 100.0 * found(text, item["answers"])},
                "prediction": text, "target": item["answers"], "kind": item["kind"], "depth": item["depth"], "prompt_tokens": len(prompts[index]),
            }  # fmt: skip


@functools.lru_cache(maxsize=2)
def text(data: str) -> str:
    """The haystack's text. Raises Refusal if a folder has no .txt file or the source cannot be read."""
    folder = Path(data).expanduser()
    if not folder.is_dir():
        return calibrate.text(HUB if data == "hub" else data)[:CHARACTERS]
    files = sorted(folder.rglob("*.txt"))
    if not files:
        raise Refusal(f"task.data={data} holds no .txt file to make haystacks of; task.data=embedded needs none.")
    try:
        return "\n\n".join(file.read_text(encoding="utf-8") for file in files)[:CHARACTERS]
    except UnicodeDecodeError as error:
        raise Refusal(f"task.data={data} holds a file that is not UTF-8 text: {error}.") from error


def _prompts(kind: str, count: int, tokens: int, depth: float, haystack, seed: int) -> list[dict]:
    """`count` prompts of at most `tokens` tokens, begin-of-text included; with the embedded haystack those of `needles.generate`."""
    from kvq.standin import lexicon, needles

    def make(index: int) -> dict:
        name = f"needles/{kind}/{tokens}/{depth}"
        return needles.fitting(
            lambda target: needles.document(lexicon.stream("eval", name, seed, index), haystack, target, kind, depth),
            tokens,
            lambda document: haystack.count(document["prompt"]) + 1,
        )

    try:
        return [make(index) for index in range(count)]
    except ValueError as error:
        raise Refusal(f"task.lengths={tokens}: {error}") from error


def found(text: str, answers: list[str]) -> float:
    """Share of the answers that occur in the text, case ignored."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)
