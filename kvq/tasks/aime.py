"""Competition problems with integer answers, sampled k times each: avg@k in percent (AIME 2024 and 2025, Block-GTQ section 12.3).

Every (problem, repeat) is an example with a random stream of its own, so a stopped run resumes with the same samples and all methods
draw with the same numbers. Repeats of a problem are averaged first: n and the standard error count problems. `finished` is the
percentage of answers that ended before the token limit.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from transformers import LogitsProcessorList

from kvq import batches
from kvq.errors import Refusal
from kvq.prompt import render, stop_ids
from kvq.records import Example, Record
from kvq.sampling import Sampler, seed_of

HUB = {"aime24": ("HuggingFaceH4/aime_2024", "train"), "aime25": ("math-ai/aime25", "test")}
REMEDY = "Without network, give a folder with aime24.jsonl or such a file (columns question and answer), or task.data=embedded."
PROBLEM, ANSWER, KEY = ("problem", "question", "Problem", "Question"), ("answer", "Answer"), ("id", "ID", "problem_idx")
INSTRUCTION = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
PLAIN = "Question: {problem}\nAnswer:"
EMBEDDED_PROBLEMS, EMBEDDED_TOKENS, EMBEDDED_SHOTS = 30, 100, 4


class AIME:
    """data: `hub`, `embedded` (written arithmetic), a .jsonl or .parquet file, or a folder of <subset>.jsonl or .parquet.

    subsets: aime24, aime25 or the folder's files; null: all. limit: first problems per subset. repeats: samples per problem.
    temperature 0 decodes greedily. chat: auto, true or false. opening: text the answer starts with (`<think>`), unless the template has
    put it there. shots: solved problems in front of each embedded one (null: four), which make prompts longer than an exact window.
    Raises Refusal on bad options.
    """

    one_pass = False
    metric = "score"
    perfect = 100.0

    def __init__(
        self, data="hub", subsets=None, limit=None, repeats=8, temperature=0.6, top_p=0.95, max_new_tokens=32768, batch_size=1,
        chat="auto", thinking=True, opening=None, shots=None, chunk=None, seed=0,
    ):  # fmt: skip
        if shots is None:
            shots = EMBEDDED_SHOTS if data == "embedded" else 0
        if isinstance(shots, bool) or not isinstance(shots, int) or shots < 0:
            raise Refusal(f"task.shots={shots} must be a whole number of at least 0.")
        if shots and data != "embedded":
            raise Refusal(f"task.shots={shots} needs worked problems, which only task.data=embedded has; the papers use none.")
        for name, value in (("limit", limit), ("repeats", repeats), ("max_new_tokens", max_new_tokens), ("chunk", chunk)):
            if not (value is None and name in ("limit", "chunk")) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise Refusal(f"task.{name}={value} must be a whole number of at least 1.")
        batches.check(batch_size)
        if temperature < 0 or not 0 < top_p <= 1:
            raise Refusal(f"task.temperature={temperature} must not be negative and task.top_p={top_p} must lie in (0, 1].")
        if temperature == 0 and repeats > 1:
            raise Refusal(f"task.temperature=0 gives the same answer {repeats} times; set task.repeats=1.")
        if chat not in ("auto", True, False):
            raise Refusal(f"task.chat={chat} is not one of auto, true, false.")
        self.data, self.limit, self.repeats, self.batch_size, self.seed = str(data), limit, repeats, batch_size, seed
        self.temperature, self.top_p, self.chunk = temperature, top_p, chunk
        self.chat, self.thinking, self.opening, self.shots = chat, thinking, opening or "", shots
        self.cap = min(max_new_tokens, EMBEDDED_TOKENS) if data == "embedded" else max_new_tokens
        self.subsets = [subsets] if isinstance(subsets, str) else subsets
        self._problems: dict[str, list[dict]] = {}

    def fits(self, max_length: int, name: str) -> None:
        """Raise Refusal if the answers alone may fill a model of `max_length` tokens."""
        if self.cap >= max_length:
            raise Refusal(f"{self.cap} new tokens leave no room for a problem in the {max_length} tokens of {name}: lower task.max_new_tokens.")

    def check(self) -> None:
        """Load the problems before any model. Raises Refusal for a missing file, column or network, or an answer that is no integer."""
        if not self._problems:
            self._problems = {subset: _checked(rows, subset) for subset, rows in self._rows().items()}
            self.content = hashlib.sha256(json.dumps(self._problems, sort_keys=True).encode()).hexdigest()[:16]

    def _rows(self) -> dict[str, list[dict]]:
        if self.data == "embedded":
            from kvq.standin.arithmetic import generate

            _known(self.subsets, ["arithmetic"])
            return {"arithmetic": generate(self.limit or EMBEDDED_PROBLEMS, self.seed)}
        if self.data == "hub":
            from kvq.lmeval import hub_dataset

            rows = {}
            for subset in _known(self.subsets, list(HUB)):
                path, split = HUB[subset]
                rows[subset] = list(islice(hub_dataset(path, None, REMEDY)[0][split], self.limit))
            return rows
        from kvq.lmeval import read_file

        path = Path(self.data).expanduser()
        if not path.exists():
            raise Refusal(f"task.data={self.data} does not exist. {REMEDY}")
        files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".jsonl", ".parquet"))
        found = {file.stem: file for file in files if file.suffix in (".jsonl", ".parquet")}
        if not found:
            raise Refusal(f"{path} holds no .jsonl or .parquet file. {REMEDY}")
        return {subset: read_file(found[subset], self.limit) for subset in _known(self.subsets, list(found))}

    def examples(self, lm) -> list[Example]:
        """Ids are <subset>/<problem>/<repeat>; the payload is {problem, answer, prompt ids}."""
        self.check()
        self.fits(lm.max_length, lm.name)
        if self.chat is True and not lm.tokenizer.chat_template:
            raise Refusal(f"task.chat=true, but the tokenizer of {lm.name} has no chat template; use task.chat=auto.")
        examples, longest = [], 0
        for subset, problems in self._problems.items():
            for item in problems:
                prompt = self._prompt(lm.tokenizer, item["problem"])
                longest = max(longest, len(prompt))
                examples += [Example(f"{subset}/{item['key']}/{r}", subset, {**item, "prompt": prompt}) for r in range(self.repeats)]
        if longest + self.cap > lm.max_length:
            raise Refusal(
                f"Prompts of up to {longest} tokens and {self.cap} new ones exceed the {lm.max_length} tokens of {lm.name}: "
                f"set task.max_new_tokens={max(lm.max_length - longest, 0)} or less."
            )
        return examples

    def _prompt(self, tokenizer, problem: str) -> list[int]:
        chat = bool(tokenizer.chat_template) if self.chat == "auto" else self.chat
        ids = render(tokenizer, self._worked() + (INSTRUCTION if chat else PLAIN).format(problem=problem), chat, self.thinking)
        if self.opening and not tokenizer.decode(ids).rstrip().endswith(self.opening.rstrip()):
            ids = ids + tokenizer(self.opening, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _worked(self) -> str:
        """The same solved problems in front of every prompt, from the streams of the next seed."""
        if not self.shots:
            return ""
        from kvq.standin.arithmetic import generate, solution

        return "".join(PLAIN.format(problem=item["problem"]) + solution(item) + "\n\n" for item in generate(self.shots, self.seed + 1))

    def run(self, lm, examples: list[Example]) -> Iterator[Record]:
        """Sample in batches of similar prompts; yields the records of a batch as soon as it is done."""
        prompts = [e.payload["prompt"] for e in examples]

        def draw(indices, width):
            seeds = [seed_of(self.seed, examples[i].id) for i in indices]
            return {"logits_processor": LogitsProcessorList([Sampler(self.temperature, self.top_p, seeds)])} if self.temperature else {}

        for index, answer, finished in batches.answers(lm, prompts, self.cap, self.batch_size, stop_ids(lm), chunk=self.chunk, options=draw):
            example, text = examples[index], lm.tokenizer.decode(answer, skip_special_tokens=True)
            number, rule = integer(text)
            yield {
                "id": example.id, "subset": example.subset, "cluster": example.id.rpartition("/")[0],
                "metrics": {"score": 100.0 * (number == example.payload["answer"]), "finished": 100.0 * finished},
                "prediction": text, "target": example.payload["answer"], "answer": number, "answer_from": rule,
                "prompt_tokens": len(prompts[index]), "new_tokens": len(answer),
            }  # fmt: skip


def _known(wanted: list[str] | None, present: list[str]) -> list[str]:
    unknown = [name for name in wanted or [] if name not in present]
    if unknown:
        raise Refusal(f"aime has no subset {', '.join(unknown)} here; there are {', '.join(present)}.")
    return list(wanted or present)


def _checked(rows: list[dict], subset: str) -> list[dict]:
    """Rows as {problem, answer, key}, whatever the columns are called. Raises Refusal with the record number."""
    items = []
    for number, row in enumerate(rows, 1):
        problem, answer, key = (next((row[name] for name in names if row.get(name) is not None), None) for names in (PROBLEM, ANSWER, KEY))
        if problem is None or answer is None:
            raise Refusal(f"{subset}, record {number}, lacks a problem or an answer; it has the columns {', '.join(row)}.")
        try:
            value = float(str(answer).strip())
        except ValueError:
            value = 0.5
        if value % 1:
            raise Refusal(f"{subset}, record {number}: the answer {answer!r} is not an integer.")
        items.append({"problem": str(problem), "answer": int(value), "key": str(number - 1 if key is None else key)})
    if not items:
        raise Refusal(f"{subset} is empty.")
    if len({item["key"] for item in items}) < len(items):
        items = [{**item, "key": str(index)} for index, item in enumerate(items)]
    return items


def integer(text: str) -> tuple[int | None, str | None]:
    """(the integer an answer names, how it was found): the last box that holds one, else "answer is N", else the last integer."""
    for content in reversed(boxes(text)):
        if (value := _value(content)) is not None:
            return value, "box"
    said = re.findall(r"answer\s+is:?[\s$*(\\]*(-?\d[\d,]*(?:\.\d+)?)", text, re.IGNORECASE)
    if said and (value := _value(said[-1].rstrip(","))) is not None:
        return value, "sentence"
    loose = re.findall(r"(?<![\w.])-?\d+(?!\.?\d)", text)
    return (int(loose[-1]), "last integer") if loose else (None, None)


def boxes(text: str) -> list[str]:
    r"""Contents of all closed \boxed{...} and \fbox{...}, in order, braces balanced."""
    found = []
    for match in re.finditer(r"\\f?box(?:ed)?\s*\{", text):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                found.append(text[match.end() : end])
                break
    return found


def _value(content: str) -> int | None:
    r"""The integer in a box: `033`, `33.0`, `\text{33}`, `n=33`, `1{,}024`, `33^\circ`, `33 \text{ minutes}`; None for anything else."""
    last = content.replace("{,}", ",").split("=")[-1]
    bare = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\[a-zA-Z]*text[a-z]*|\\math[a-z]+|\\[ ,;!%$]|[{}$*~%]", " ", last)
    match = re.fullmatch(r"\s*([-+]?\s*\d{1,3}(?:,\d{3})+|[-+]?\s*\d+(?:\.\d*)?)\s*[a-zA-Z ]*\.?\s*", bare)
    if not match or float(number := match.group(1).replace(",", "").replace(" ", "")) % 1:
        return None
    return int(float(number))
