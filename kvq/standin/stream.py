"""Training rows: text and tasks packed to one length, made by worker processes while the model trains."""

import json
import multiprocessing
import os
import queue
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

from kvq.standin import arithmetic, choices, filler, lexicon, needles, recall, suite, templates

BOS, EOS = 0, 1
ITEM = 32768
PROSE_SHARE = 0.3
CONTEXT, TEXT, ANSWER = 1, 2, 3
TASKS = {"needles": 16, "pairs": 10, "reverse": 18, "passage_retrieval_en": 14, "passage_count": 6, "trec": 7, "choices": 4, "triviaqa": 4,
         "multifieldqa_en": 5, "qasper": 6, "hotpotqa": 7, "2wikimqa": 6, "gov_report": 5, "qmsum": 6, "lcc": 3, "repobench-p": 4, "arithmetic": 6}
EARLY = {"reverse": 30}


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one row length: its share of the time, the share of text draws, and the loss weights of context, text
    and answers."""

    length: int
    share: float
    text: float
    weights: tuple[float, float, float]


PHASES = (Phase(512, 0.16, 0.10, (0.4, 1.0, 4.0)), Phase(2048, 0.36, 0.10, (0.3, 1.0, 6.0)),
          Phase(8192, 0.33, 0.10, (0.2, 1.0, 8.0)), Phase(16384, 0.15, 0.10, (0.2, 1.0, 8.0)))


def turns(name: str, rng: Random, haystack: filler.Filler, tokens: int) -> list[tuple[str, str]]:
    """One training document of a task: prompts and answers in turn, of about ``tokens`` tokens."""
    if name in suite.MAKERS:
        extra = ()
        if name == "passage_retrieval_en":
            most = max(2, min(30, (tokens - 230) // 34))
            extra = (rng.randint(2, most) if rng.random() < 0.6 else most,)
        document = suite.MAKERS[name](rng, haystack, tokens, *extra)
        again = templates.TEMPLATES[name].split("{context}")[1]
        others = rng.sample(list(enumerate(document.get("leads", []))), min(rng.choice((0, 1, 3)), len(document.get("leads", [])), tokens // 400))
        return [(templates.prompt(name, document), templates.completion(name, document["answers"][0])),
                *((again.replace("{input}", lead), f" Paragraph {index + 1}") for index, lead in others)]
    if name == "needles":
        document = needles.document(rng, haystack, tokens, rng.choice(needles.KINDS), rng.random())
        return [(document["prompt"], " " + ", ".join(document["answers"]))]
    makers = {"pairs": recall.pairs, "reverse": recall.reverse, "choices": choices.turns, "arithmetic": arithmetic.turns}
    return makers[name](rng, haystack, tokens)


class Writer:
    """Makes rows of tokens and their weight classes out of the shelf's text and the task generators."""

    def __init__(self, shelf: Path, tokenizer: Path, seed: str, sources: int = 6000, prose: float = PROSE_SHARE):
        self.prose = prose
        self.tokenizer = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self.text = {kind: np.load(shelf / f"{kind}.npy", mmap_mode="r") for kind in ("code", "prose")}
        self.rng = lexicon.stream("train", f"stream/{seed}", 0)
        texts = json.loads((shelf / "texts.json").read_text())
        self.rng.shuffle(texts["prose"])
        self.rng.shuffle(texts["code"])
        self.filler = filler.Filler(filler.pieces(texts["prose"])[:sources], texts["code"][:400], lambda text: len(self.encode(text)))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def task(self, tokens: int, early: bool) -> tuple[list[int], list[int]]:
        """Tokens and classes of one task document of about ``tokens`` tokens."""
        table = TASKS | EARLY if early else TASKS
        name = self.rng.choices(list(table), list(table.values()))[0]
        ids, classes = [BOS], [0]
        for prompt, answer in turns(name, self.rng, self.filler, tokens):
            asked, said = self.encode(prompt), [*self.encode(answer), EOS]
            ids += asked + said
            classes += [CONTEXT] * len(asked) + [ANSWER] * len(said)
        return ids, classes

    def passage(self, tokens: int) -> tuple[list[int], list[int]]:
        """A stretch of code or prose, usually after a bos token."""
        source = self.text["prose" if self.rng.random() < self.prose else "code"]
        start = self.rng.randrange(max(1, len(source) - tokens))
        ids = source[start:start + tokens].tolist()
        if self.rng.random() < 0.8:
            ids = [BOS, *ids[:-1]]
        return ids, [TEXT] * len(ids)

    def row(self, length: int, text: float = 0.4) -> tuple[list[int], list[int]]:
        """length + 1 tokens: documents one after the other; one that does not fit any more gives way to text."""
        ids: list[int] = []
        classes: list[int] = []
        while (space := length + 1 - len(ids)) > 0:
            size = space if self.rng.random() < 0.5 else int(min(space, 300 * (max(space, 300) / 300) ** self.rng.random()))
            if space < 300 or self.rng.random() < text:
                more = self.passage(min(space, max(size, 64)))
            else:
                more = self.task(max(size, 300) - 24, length <= 512)
                if len(more[0]) > space:
                    more = self.passage(min(space, 300))
            ids += more[0]
            classes += more[1]
        return ids, classes


def _serve(shelf: Path, tokenizer: Path, seed: str, phase, outbox, phases: tuple[Phase, ...], prose: float) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    writer = Writer(shelf, tokenizer, seed, prose=prose)
    while (current := phase.value) >= 0:
        length = phases[current].length
        rows = [writer.row(length, phases[current].text) for _ in range(max(1, ITEM // length))]
        item = (current, np.array([ids for ids, _ in rows], np.uint16), np.array([classes for _, classes in rows], np.uint8))
        while phase.value == current:
            try:
                outbox.put(item, timeout=0.5)
                break
            except queue.Full:
                continue
    outbox.cancel_join_thread()


class Stream:
    """Worker processes and their queue. ``take`` blocks until enough rows of the current phase have come."""

    def __init__(self, shelf: Path, tokenizer: Path, seed: str, workers: int, phases: tuple[Phase, ...], prose: float = PROSE_SHARE):
        context = multiprocessing.get_context("fork")
        self.phase, self.queue, self.dropped = context.Value("i", 0), context.Queue(24), 0
        self.workers = [context.Process(target=_serve, args=(shelf, tokenizer, f"{seed}/{index}", self.phase, self.queue, phases, prose), daemon=True)
                        for index in range(workers)]
        for worker in self.workers:
            worker.start()

    def take(self, phase: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """ids [B, T + 1] int64 and classes of at least ``tokens`` tokens."""
        self.phase.value = phase
        taken, have = [], 0
        while have < tokens:
            item = self.queue.get(timeout=120)
            if item[0] != phase:
                self.dropped += 1
                continue
            taken.append(item)
            have += item[1].size
        return np.concatenate([ids for _, ids, _ in taken]).astype(np.int64), np.concatenate([classes for _, _, classes in taken]).astype(np.int64)

    def close(self) -> None:
        """End the workers."""
        self.phase.value = -1
        for worker in self.workers:
            worker.terminate()
            worker.join()
