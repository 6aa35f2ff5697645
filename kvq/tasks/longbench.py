"""LongBench v1 (Bai et al., ACL 2024): lm-eval's prompts and metrics on upstream, local or embedded data.

Every metric is in percent (0 to 100). The score of a subset is the mean over its examples; the score of a group is the plain mean
over its subsets.

Departures from lm-eval's own run of these tasks:
- A prompt that does not fit loses its middle (LongBench's rule); lm-eval cuts from the left, instruction first.
- The chat template is off for few-shot and code subsets (LongBench's rule); lm-eval knows only all or nothing.
- Answers of few-shot subsets end at the first newline *after* leading newlines were dropped (LongBench's rule); lm-eval makes an
  answer that starts with a newline empty. `strict_stop=true` restores that.
- Prompts of a subset that begin alike (questions on one document) read that beginning once; answers do not depend on it.
- Turn-end tokens of all model families stop generation, whether or not the checkpoint's config lists them.
Inherited from lm-eval and upstream: ROUGE-L of two sentences of about 1,000 words together is 0, because the scorer swallows its own
recursion error; without the package python-Levenshtein the code similarity uses difflib, whose ratio differs slightly.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from kvq import batches
from kvq.errors import Refusal
from kvq.prompt import FirstLine, first_line, fit, stop_ids
from kvq.records import Example, Record
from kvq.taskdata import embedded_version

CATEGORIES = {
    "narrativeqa": "single-doc QA", "qasper": "single-doc QA", "multifieldqa_en": "single-doc QA", "multifieldqa_zh": "single-doc QA",
    "hotpotqa": "multi-doc QA", "2wikimqa": "multi-doc QA", "musique": "multi-doc QA", "dureader": "multi-doc QA",
    "gov_report": "summarization", "qmsum": "summarization", "multi_news": "summarization", "vcsum": "summarization",
    "trec": "few-shot", "triviaqa": "few-shot", "samsum": "few-shot", "lsht": "few-shot",
    "passage_count": "synthetic", "passage_retrieval_en": "synthetic", "passage_retrieval_zh": "synthetic",
    "lcc": "code", "repobench-p": "code",
}  # fmt: skip
LENGTH_BALANCED = (  # subsets with an `_e` twin (LongBench-E)
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum",
    "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)  # fmt: skip
GROUPS = {
    "gsrq7": ["narrativeqa", "qasper", "multifieldqa_en", "qmsum", "musique", "triviaqa", "samsum"],
    "blockgtq8": ["qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "trec", "passage_retrieval_en", "lcc"],
    "kivi8": ["qasper", "qmsum", "multi_news", "trec", "triviaqa", "samsum", "lcc", "repobench-p"],
    "kivi15": [
        "narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "musique", "2wikimqa", "gov_report", "qmsum", "multi_news", "lcc",
        "repobench-p", "triviaqa", "samsum", "trec", "passage_retrieval_en",
    ],
    "all": list(CATEGORIES),
}  # fmt: skip
GROUPS["kivi15"] = sorted(GROUPS["kivi15"], key=list(CATEGORIES).index)
VALID = [*CATEGORIES, *(f"{name}_e" for name in LENGTH_BALANCED)]
BARE = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")  # no chat template: LongBench, pred.py
HUB = "Xnhyacinth/LongBench"
EMBEDDED_EXAMPLES = 20  # per subset, when no limit is given
REMEDY = "Pass task.data=<folder with one <subset>.jsonl or .parquet each, in LongBench's format>, or task.data=embedded."


class LongBench:
    """data: `hub`, `embedded`, a folder holding <subset>.jsonl or <subset>.parquet in upstream's columns, or one such file.

    subsets: a name, a group (gsrq7, blockgtq8, kivi8, kivi15, all) or a list of either; null: all that the data has. limit: first examples per subset.
    context: prompt and answer together, in tokens (null: all the model has). chat: auto, true or false. max_new_tokens: lowers
    the subsets' own answer caps. max_prompt_tokens: a cap on the prompt alone (Block-GTQ: 31,500). chunk: prefill in pieces of this many tokens. Raises Refusal on unknown names.
    After `check`: sources (subset to where its data came from) and content (a hash of them).
    """

    one_pass = False
    metric = "score"
    perfect = 100.0

    def __init__(
        self, data="hub", subsets=None, limit=None, context=None, batch_size=1, seed=0, chat="auto", thinking=False,
        max_prompt_tokens=None, max_new_tokens=None, strict_stop=False, chunk=None,
    ):  # fmt: skip
        self.data, self.limit, self.context, self.batch_size, self.seed = str(data), limit, context, batch_size, seed
        self.thinking, self.max_new_tokens, self.strict_stop, self.chunk = thinking, max_new_tokens, strict_stop, chunk
        self.max_prompt_tokens = max_prompt_tokens
        if chat not in ("auto", True, False):
            raise Refusal(f"task.chat={chat} is not one of auto, true, false.")
        numbers = {"limit": limit, "context": context, "max_prompt_tokens": max_prompt_tokens, "max_new_tokens": max_new_tokens, "chunk": chunk}
        for name, value in numbers.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise Refusal(f"task.{name}={value} must be a whole number of at least 1.")
        batches.check(batch_size)
        self.chat, self.subsets = chat, _present(self.data) if subsets is None else expand(subsets)
        self.categories = {subset: CATEGORIES[_plain(subset)] for subset in self.subsets}
        self.sources: dict[str, str] = {}
        self._docs: dict[str, list[dict]] = {}
        self._tasks: dict = {}

    def check(self) -> None:
        """Load and check the data, before any model: raises Refusal for a missing folder, file, column, or network."""
        if self.data == "embedded":
            from kvq.standin.suite import SUBSETS

            absent = [subset for subset in self.subsets if subset not in SUBSETS]
            if absent:
                raise Refusal(f"The embedded data has no {', '.join(absent)}; it has {', '.join(SUBSETS)}. Name those in task.subsets, or none for all.")
            self.sources = dict.fromkeys(self.subsets, f"embedded, seed {self.seed}, code {embedded_version('suite')}")
        for subset in self.subsets if self.data != "embedded" else ():
            if subset not in self._docs:
                rows, self.sources[subset] = _from_hub(subset, self.limit) if self.data == "hub" else _from_folder(self.data, subset, self.limit)
                self._docs[subset] = _checked(rows, subset, self.sources[subset])
        self.content = hashlib.sha256(json.dumps(self.sources, sort_keys=True).encode()).hexdigest()[:16]

    def examples(self, lm) -> list[Example]:
        """All examples, subset by subset in the data's order; ids are `<subset>/<_id>`, or the row number where ids are not unique."""
        self.check()
        context = self._context(lm)
        if self.chat is True and not lm.tokenizer.chat_template:
            raise Refusal(f"task.chat=true, but the tokenizer of {lm.name} has no chat template; use task.chat=auto.")
        examples = []
        for subset in self.subsets:
            if self.data == "embedded":
                self._embed(subset, lm, context)
            docs = self._docs[subset]
            keys = [str(doc.get("_id") or "") for doc in docs]
            if "" in keys or len(set(keys)) < len(keys):
                keys = [str(index) for index in range(len(docs))]
            self._tasks[subset] = _task(subset, docs)
            if self._cap(subset) >= context:
                raise Refusal(f"{subset} may answer with {self._cap(subset)} tokens, which fills the context of {context}: set task.max_new_tokens.")
            examples += [Example(f"{subset}/{key}", subset, doc) for key, doc in zip(keys, docs)]
        return examples

    def run(self, lm, examples: list[Example]) -> Iterator[Record]:
        """Generate greedily in batches of similar length, longest first; yields each record as soon as its batch is done."""
        stops, context = stop_ids(lm), self._context(lm)
        for subset in self.subsets:
            chat, cap = self._templated(subset, lm.tokenizer), self._cap(subset)
            some = [example for example in examples if example.subset == subset]
            texts = [self._tasks[subset].fewshot_context(example.payload, num_fewshot=0) for example in some]
            room = min(context - cap, self.max_prompt_tokens or context)
            prompts = [fit(lm.tokenizer, text, room, chat, self.thinking) for text in texts]
            for index, answer, _ in batches.answers(lm, [ids for ids, _ in prompts], cap, self.batch_size, stops, chunk=self.chunk, options=self._ends(lm, subset)):
                ids, length = prompts[index]
                yield self._record(some[index], answer, lm.tokenizer) | {
                    "prompt_tokens": len(ids), "full_prompt_tokens": length, "new_tokens": len(answer),
                    "truncated": "middle" if length > len(ids) else None, "chat": chat,
                }  # fmt: skip

    def fits(self, max_length: int, name: str) -> None:
        """Raise Refusal if the context is longer than a model of `max_length` tokens allows."""
        if self.context and self.context > max_length:
            raise Refusal(f"task.context={self.context} exceeds the {max_length} tokens of {name}: set it to {max_length} or less.")

    def _context(self, lm) -> int:
        self.fits(lm.max_length, lm.name)
        return self.context or lm.max_length

    def _cap(self, subset: str) -> int:
        own = _config(subset)["generation_kwargs"]["max_gen_toks"]
        if self.data == "embedded":
            from kvq.standin.suite import NEW_TOKENS

            own = min(own, NEW_TOKENS[subset])  # embedded answers are shorter than upstream's
        return min(own, self.max_new_tokens or own)

    def _templated(self, subset: str, tokenizer) -> bool:
        if self.chat == "auto":
            return bool(tokenizer.chat_template) and _plain(subset) not in BARE
        return self.chat

    def _ends(self, lm, subset: str):
        """Keywords of a generate call that ends rows at the first line, where the subset's answers are one line."""
        if not self._until(subset):
            return None
        return lambda _, width: {"stopping_criteria": [FirstLine(lm.tokenizer, width, self.strict_stop)]}

    def _until(self, subset: str) -> list[str]:
        until = _config(subset)["generation_kwargs"]["until"]
        if until not in ([], ["\n"]):
            raise Refusal(f"lm-eval's {subset} now stops at {until}; only the end of the first line is implemented.")
        return until

    def _record(self, example: Example, answer: list[int], tokenizer) -> Record:
        from kvq.lmeval import quiet

        subset, doc = example.subset, example.payload
        text = tokenizer.decode(answer, skip_special_tokens=True)
        prediction = first_line(text, self.strict_stop) if self._until(subset) else text
        with quiet():
            metrics = self._tasks[subset].process_results(doc, [prediction])
        percent = {name: 100.0 * float(value) for name, value in metrics.items()}
        return {"id": example.id, "subset": subset, "metrics": percent, "prediction": prediction, "target": doc["answers"]}

    def _embed(self, subset: str, lm, context: int) -> None:
        from kvq.standin.suite import generate

        try:
            rows = generate(subset, self.limit or EMBEDDED_EXAMPLES, context - self._cap(subset), lm.tokenizer, self.seed)
        except ValueError as error:
            raise Refusal(f"task.data=embedded: {error} Set task.context.") from error
        self._docs[subset] = _checked(rows, subset, self.sources[subset])


def expand(subsets) -> list[str]:
    """Subset names from a name, a group, or a list of either, without repeats. Raises Refusal listing what exists."""
    names = [subsets] if isinstance(subsets, str) else list(subsets or [])
    unknown = [name for name in names if name not in GROUPS and name not in VALID]
    if unknown or not names:
        what = f"no subset {', '.join(map(str, unknown))}" if unknown else "nothing to do with an empty list of subsets"
        raise Refusal(f"LongBench has {what}. Groups: {', '.join(GROUPS)}. Subsets: {', '.join(CATEGORIES)}; with _e: {', '.join(LENGTH_BALANCED)}.")
    return list(dict.fromkeys(subset for name in names for subset in GROUPS.get(name, [name])))


def _plain(subset: str) -> str:
    return subset.removesuffix("_e")


def _config(subset: str) -> dict:
    from kvq.lmeval import task_config

    return task_config(f"longbench/{subset}.yaml")


def _task(subset: str, docs: list[dict]):
    from datasets import Dataset

    from kvq.lmeval import load_task

    return load_task(_config(subset), {"test": Dataset.from_list(docs)})


def _from_hub(subset: str, limit: int | None) -> tuple[list[dict], str]:
    from kvq.lmeval import hub_dataset

    dataset, revision = hub_dataset(HUB, subset, REMEDY)
    return list(islice(dataset["test"], limit)), f"{HUB}@{revision}"


def _from_folder(data: str, subset: str, limit: int | None) -> tuple[list[dict], str]:
    from kvq.lmeval import read_file

    files = _files(data)
    if subset not in files:
        present = ", ".join(files) or "nothing that is called like a subset"
        raise Refusal(f"{data} has no {subset}.jsonl or {subset}.parquet (it holds {present}). Choose subsets with task.subsets=[...].")
    with open(files[subset], "rb") as stream:
        return read_file(files[subset], limit), f"{files[subset].name} sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()[:16]}"


def _files(data: str) -> dict[str, Path]:
    """Subset to file: a folder's <subset>.jsonl or .parquet, or one file whose name ends with a subset's."""
    from kvq.lmeval import find_file

    path = Path(data).expanduser()
    if path.is_file():
        names = [name for name in VALID if path.stem == name or path.stem.endswith(f"_{name}")]
        if not names:
            raise Refusal(f"task.data={data} is not called like a LongBench subset, for example multi_news.jsonl. {REMEDY}")
        return {max(names, key=len): path}
    if not path.is_dir():
        raise Refusal(f"task.data={data} is not a folder. {REMEDY}")
    return {subset: file for subset in VALID if (file := find_file(path, subset))}


def _present(data: str) -> list[str]:
    """The subsets that the data has, in LongBench's order."""
    if data == "embedded":
        from kvq.standin.suite import SUBSETS

        return [subset for subset in CATEGORIES if subset in SUBSETS]
    if data == "hub":
        return list(CATEGORIES)
    found = list(_files(data))
    if not found:
        raise Refusal(f"{data} has no file called like a LongBench subset. {REMEDY}")
    return found


def _checked(rows: list[dict], subset: str, source: str) -> list[dict]:
    """Rows in the columns that lm-eval's prompts name: upstream's `input` is their `question`."""
    needed = ["context", "answers"] + (["all_classes"] if _plain(subset) in ("trec", "lsht") else [])
    docs = []
    for number, row in enumerate(rows, 1):
        row = dict(row)
        if "question" not in row and "input" in row:
            row["question"] = row.pop("input")
        missing = [name for name in needed if row.get(name) is None] + ([] if "question" in row else ["input"])
        if missing or not isinstance(row["answers"], list) or not row["answers"]:
            lacks = ", ".join(missing) or "a list of answers"
            raise Refusal(f"{subset} ({source}), record {number}, lacks {lacks}: LongBench's columns are input, context, answers, all_classes, _id.")
        docs.append(row)
    if not docs:
        raise Refusal(f"{subset} ({source}) is empty.")
    return docs
