"""Multiple choice by likelihood in one pass: the embedded counterpart of the few-shot tasks, percent right.

An item shows many pairs of a thing and its class and asks for one that it has shown, so the answer stands in the cache and nowhere
else. Scored as lm-eval scores multiple choice: the choice with the highest summed log-likelihood behind the context. `gold_loss`, the
negative log-likelihood of the right choice in nats, moves before the choice flips.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from kvq import batches
from kvq.errors import Refusal
from kvq.records import Example, Record


class Choices:
    """data: `embedded`, or a .jsonl or .parquet file with columns context, choices, gold (index). limit: items. lines: pairs shown per embedded item.

    batch_size: items at once, or auto. Raises Refusal on bad options.
    """

    one_pass = True
    metric = "score"
    perfect = 100.0

    def __init__(self, data="embedded", subsets=None, limit=100, lines=48, batch_size=4, seed=0):
        if subsets:
            raise Refusal("choices has no subsets; drop task.subsets.")
        for name, value, least in (("limit", limit, 1), ("lines", lines, 4)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise Refusal(f"task.{name}={value} must be a whole number of at least {least}.")
        batches.check(batch_size)
        if data == "hub":
            raise Refusal("choices has no data on the hub: use task=fewshot, or task.data=embedded or a file.")
        self.data, self.limit, self.lines, self.batch_size, self.seed = str(data), limit, lines, batch_size, seed
        self._items: list[dict] = []

    def fits(self, max_length: int, name: str) -> None:
        """Raise Refusal if embedded items must be longer than a model of `max_length` tokens allows: a line takes at least four."""
        if self.data == "embedded" and 4 * self.lines > max_length:
            raise Refusal(f"task.lines={self.lines} makes items of more than the {max_length} tokens that {name} allows: lower it.")

    def check(self) -> None:
        """Make or read the items before any model. Raises Refusal for a missing file or a bad column."""
        if self._items:
            return
        if self.data == "embedded":
            from kvq.standin.choices import generate

            self._items = generate(self.limit, self.seed, self.lines)
        else:
            self._items = _read(Path(self.data).expanduser(), self.limit)
        self.content = hashlib.sha256(json.dumps(self._items, sort_keys=True).encode()).hexdigest()[:16]

    def examples(self, lm) -> list[Example]:
        """One example per item. Raises Refusal if an item is longer than the model allows: lm-eval would cut it on the left."""
        self.check()
        for number, item in enumerate(self._items):
            length = max(len(lm.tokenizer(f"{item['context']} {choice}", verbose=False)["input_ids"]) for choice in item["choices"])
            if length > lm.max_length:
                raise Refusal(f"Item {number} has {length} tokens, more than the {lm.max_length} of {lm.name}: set task.lines below {self.lines} or give shorter items.")
        return [Example(f"choices/{i}", "choices", item) for i, item in enumerate(self._items)]

    def run(self, lm, examples: list[Example]) -> Iterator[Record]:
        """Score items, `batch_size` at a time; the choices of an item share its context, those of one token the whole forward."""
        from lm_eval.api.instance import Instance

        from kvq.lmeval import CachedLM

        adapter = CachedLM(lm)

        def work(batch, rows):
            adapter.batch_size_per_gpu = rows
            requests = [Instance("loglikelihood", {}, (e.payload["context"], f" {choice}"), i) for e in batch for i, choice in enumerate(e.payload["choices"])]
            answers = iter(adapter.loglikelihood(requests, disable_tqdm=True))
            return [[next(answers)[0] for _ in e.payload["choices"]] for e in batch]

        def tokens(example):
            return len(lm.tokenizer(example.payload["context"], verbose=False)["input_ids"])

        for example, scores in batches.run(lm, sorted(examples, key=lambda e: -len(e.payload["context"])), self.batch_size, work, tokens):
            item, best = example.payload, max(range(len(scores)), key=scores.__getitem__)
            yield {
                "id": example.id, "subset": example.subset,
                "metrics": {"score": 100.0 * (best == item["gold"]), "gold_loss": -scores[item["gold"]]},
                "prediction": item["choices"][best], "target": item["choices"][item["gold"]],
                "likelihoods": scores, "chance": 100.0 / len(scores),
            }  # fmt: skip


def _read(file: Path, limit: int) -> list[dict]:
    from kvq.lmeval import read_file

    if not file.is_file():
        raise Refusal(f"task.data={file} is not a file; give one with the columns context, choices, gold, or task.data=embedded.")
    items = []
    for number, row in enumerate(read_file(file, limit), 1):
        choices, gold = row.get("choices"), row.get("gold")
        if not isinstance(row.get("context"), str) or not isinstance(choices, list) or len(choices) < 2 or gold not in range(len(choices)):
            raise Refusal(f"{file}, record {number}: expected context (text), choices (two or more texts) and gold (the index of the right one).")
        items.append({"context": row["context"], "choices": [str(choice) for choice in choices], "gold": int(gold)})
    if not items:
        raise Refusal(f"{file} is empty.")
    return items
