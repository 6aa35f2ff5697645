"""Needle in a haystack, the six kinds of Block-GTQ (single, distractor, multi, multikey, multivalue, multiquery) over lengths and depths.

Every prompt of a (kind, length, depth, trial) cell is the same for all methods, so differences are paired. Score: the fraction of
answers found in the output, case ignored, in percent. The paper recycles eight paragraphs and one needle set; here needles and
haystack change with every trial. Subsets are kinds at a length (`single@2048`); `heat` keeps depth for the map.
"""

from collections.abc import Iterator

from kvq.errors import Refusal
from kvq.prompt import left_pad, stop_ids, until_stop
from kvq.records import Example, Record

KINDS = ("single", "distractor", "multi", "multikey", "multivalue", "multiquery")


class NIAH:
    """data: `embedded`. subsets: kinds, null for all six. lengths: prompt tokens. depths: how many, evenly spaced from 0 to 1. limit: trials per cell."""

    one_pass = False
    metric = "score"
    perfect = 100.0

    def __init__(self, data: str, limit: int, subsets: list[str] | None, context: int | None, lengths: list[int], depths: int, batch_size: int, max_new_tokens: int, seed: int = 0):
        unknown = [s for s in subsets or [] if s not in KINDS]
        if unknown:
            raise Refusal(f"niah has no subset {', '.join(unknown)}; choose from {', '.join(KINDS)}.")
        if data != "embedded":
            raise Refusal(f"task.data={data}: niah builds its haystacks from the embedded corpus; set task.data=embedded.")
        if min(limit, depths, batch_size) < 1:
            raise Refusal("task.limit, task.depths and task.batch_size must be at least 1.")
        self.data, self.limit, self.subsets = data, limit, tuple(subsets or KINDS)
        self.lengths = [context] if context else list(lengths)
        self.depths = [round(i / max(depths - 1, 1), 3) for i in range(depths)] if depths > 1 else [0.5]
        self.batch_size, self.max_new_tokens, self.seed = batch_size, max_new_tokens, seed

    def examples(self, lm) -> list[Example]:
        from kvq.standin import needles

        too_long = [n for n in self.lengths if n + self.max_new_tokens > lm.max_length]
        if too_long:
            raise Refusal(f"task.lengths={too_long} with {self.max_new_tokens} new tokens exceeds the {lm.max_length} tokens that {lm.name} allows.")
        found = []
        for length in self.lengths:
            for kind in self.subsets:
                for at, depth in enumerate(self.depths):
                    seed = self.seed + 1000 * at + 100_000 * length
                    for trial, item in enumerate(needles.generate(kind, self.limit, length, depth, lm.tokenizer, seed)):
                        found.append(Example(f"{kind}/{length}/{depth}/{trial}", f"{kind}@{length}", item))
        return found

    def run(self, lm, examples: list[Example]) -> Iterator[Record]:
        stops = stop_ids(lm)
        pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else stops[0]
        prompts = [(e, lm.tokenizer(e.payload["prompt"], verbose=False)["input_ids"]) for e in examples]
        prompts.sort(key=lambda item: -len(item[1]))
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            ids, mask = left_pad([row for _, row in batch], pad)
            rows = lm.generate(ids, mask, self.max_new_tokens, stops).tolist()
            for (example, prompt), row in zip(batch, rows):
                text = lm.tokenizer.decode(until_stop(row, [*stops, pad]), skip_special_tokens=True)
                item = example.payload
                yield {
                    "id": example.id, "subset": example.subset, "metrics": {"score": 100.0 * found(text, item["answers"])},
                    "prediction": text, "target": item["answers"], "kind": item["kind"], "depth": item["depth"], "prompt_tokens": len(prompt),
                }  # fmt: skip


def found(text: str, answers: list[str]) -> float:
    """Share of the answers that occur in the text, case ignored."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)
