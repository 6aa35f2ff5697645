"""Any task of lm-eval by name, scored example by example on the quantized cache, so that a stopped run resumes.

Prompts, shots, filters and metrics are lm-eval's. A record holds every metric that lm-eval averages over examples, in lm-eval's unit
(mostly 0 to 1), and `score`, in percent: 100 times the metric chosen, else acc_norm where the task has it, else its first metric.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from kvq import batches, taskdata
from kvq.errors import Refusal
from kvq.records import Example, Record
from kvq.taskdata import EMBEDDED

ONE_PASS = ("loglikelihood", "multiple_choice")
OFFLINE = (
    "Run it once where there is a network (the data is then cached; HF_HUB_OFFLINE=1 reads the cache without asking), "
    "or pass task.data=<folder with <task>/<split>.jsonl or .parquet>."
)
LOADERS = ("json", "parquet", "csv", "text", "arrow")  # local files through the data library: no hub involved


class LMEval:
    """tasks: names of lm-eval tasks, groups or tags. num_fewshot: one number, or {name: number} (null: the task's own).

    A group that lm-eval averages over examples (mmlu) is one subset; of any other group or tag each task is a subset.
    data: `hub`, `embedded` (those of the tasks that kvq.taskdata makes), or a folder with <task>/<split>.jsonl or .parquet. include_path: folder with task YAMLs of your own.
    fewshot_seed: draws the shots (1234 is lm-eval's) and the prompts of tasks that make their own. seed: of the embedded data. chat: wrap
    prompts in the chat template. metadata: what tasks that make their own prompts ask for (RULER: max_seq_lengths, tokenizer). needs:
    {task: hub data set that it loads by itself}. score: the metric that is the score, for example exact_match/flexible-extract.
    Raises Refusal on unknown names.
    """

    metric = "score"
    perfect = 100.0

    def __init__(
        self, tasks, num_fewshot=None, limit=None, batch_size=1, data="hub", include_path=None, chat=False, max_new_tokens=None,
        fewshot_seed=1234, chunk=None, metadata=None, needs=None, seed=0, score=None,
    ):  # fmt: skip
        from kvq.lmeval import manager
        from kvq.models import folder

        self.names = [tasks] if isinstance(tasks, str) else list(tasks or [])
        if not self.names:
            raise Refusal("task=lm_eval needs task.tasks=[<names of lm-eval tasks>], for example task.tasks=[arc_easy,piqa].")
        batches.check(batch_size)
        self.num_fewshot, self.limit, self.batch_size, self.data = num_fewshot, limit, batch_size, str(data)
        self.chat, self.max_new_tokens, self.fewshot_seed, self.chunk = chat, max_new_tokens, fewshot_seed, chunk
        if include_path and not Path(include_path).is_dir():
            raise Refusal(f"task.include_path={include_path} is not a folder.")
        if self.data == "embedded" and any(name in EMBEDDED for name in self.names):
            self.names = [name for name in self.names if name in EMBEDDED]
        self.needs, metadata, self.seed, self.score = dict(needs or {}), dict(metadata or {}), seed, score
        if "tokenizer" in metadata:
            metadata["tokenizer"] = str(folder(metadata["tokenizer"]) or metadata["tokenizer"])
        self.metadata = metadata
        self.manager = manager(tuple(self.names), include_path, json.dumps(metadata, sort_keys=True))
        self.leaves = {name: _leaves(self.manager.task_index, name) for name in self.names}
        if isinstance(num_fewshot, dict) and (missing := [name for name in self.names if name not in num_fewshot]):
            raise Refusal(f"task.num_fewshot has no entry for {', '.join(missing)} (it has {', '.join(num_fewshot)}): add one, or give one number for all tasks.")
        self.subset_of, self.categories = {}, {}
        for name, leaves in self.leaves.items():
            pooled = _pooled(self.manager.task_index[name].cfg)
            for leaf in leaves:
                self.subset_of[leaf] = name if pooled else leaf
                self.categories[self.subset_of[leaf]] = name
        kinds = {leaf: cfg.get("output_type", "generate_until") for leaves in self.leaves.values() for leaf, cfg in leaves.items()}
        rolling = [leaf for leaf, kind in kinds.items() if kind == "loglikelihood_rolling"]
        if rolling:
            raise Refusal(f"{', '.join(rolling)} measures perplexity over whole documents, not per example: use task=perplexity.")
        self.one_pass = any(kind in ONE_PASS for kind in kinds.values())
        self._tasks: dict = {}

    def fits(self, max_length: int, name: str) -> None:
        """Raise Refusal if prompts or answers are asked for that a model of `max_length` tokens cannot hold."""
        for option, tokens in (("metadata.max_seq_lengths", max(self.metadata.get("max_seq_lengths", [0]))), ("max_new_tokens", (self.max_new_tokens or 0) + 1)):
            if tokens > max_length:
                raise Refusal(f"task.{option} asks for more than the {max_length} tokens that {name} holds: lower it.")

    def check(self) -> None:
        """Load the data before any model: raises Refusal for a missing folder, file, split, or network."""
        if self._tasks:
            return
        sources = {}
        if self.data == "hub":
            from kvq.lmeval import hub_revision

            for leaf, cfg in self._all_leaves().items():
                path = cfg.get("dataset_path")
                if path and path not in LOADERS and not Path(path).exists() and path not in sources:
                    sources[path] = hub_revision(path, f"It is the data of {leaf}. {OFFLINE}")[0]
            for path in {path for leaf, path in self.needs.items() if leaf in self.subset_of}:
                sources[path] = hub_revision(path, OFFLINE.split(", or")[0] + ".")[0]
        for name in self.names:
            self._load(name, sources)
        for leaf, task in self._tasks.items():
            self._shots(leaf, task)
            if task.OUTPUT_TYPE == "generate_until" and self.max_new_tokens:
                task.set_config("generation_kwargs", {"max_gen_toks": self.max_new_tokens}, update=True)
            if not _averaged(task):
                raise Refusal(f"{leaf} has only metrics over the whole set ({', '.join(task.aggregation())}), none per example; it is not supported.")
        self.content = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:16]

    def examples(self, lm) -> list[Example]:
        """One example per document; ids are `<task>/<row>`, payload is the document's requests."""
        from kvq.lmeval import CachedLM, quiet

        self.check()
        adapter = CachedLM(lm)
        if self.chat and not lm.tokenizer.chat_template:
            raise Refusal(f"task.chat=true, but the tokenizer of {lm.name} has no chat template.")
        examples = []
        for leaf, task in self._tasks.items():
            if task.OUTPUT_TYPE == "generate_until":
                cap = _cap(task, adapter)
                if cap >= lm.max_length:
                    raise Refusal(f"{leaf} may answer with {cap} tokens but {lm.name} holds {lm.max_length}: set task.max_new_tokens.")
            # Shots are drawn document after document from one generator: build from the first, also when resuming.
            template = {"apply_chat_template": True, "chat_template": adapter.apply_chat_template} if self.chat else {}
            task.set_fewshot_seed(self.fewshot_seed)
            with quiet():
                task.build_all_requests(limit=self.limit, **template)
            documents = defaultdict(list)
            for request in task.instances:
                documents[request.doc_id].append(request)
            examples += [Example(f"{leaf}/{row}", self.subset_of[leaf], (leaf, requests)) for row, requests in documents.items()]
        return examples

    def run(self, lm, examples: list[Example]) -> Iterator[Record]:
        """Score in chunks of a few batches, longest prompts first; yields the records of a chunk as soon as it is done."""
        from kvq.lmeval import CachedLM, quiet

        adapter = CachedLM(lm, chunk=self.chunk)
        groups = defaultdict(list)
        for example in examples:
            groups[example.payload[0]].append(example)
        for leaf, group in groups.items():
            task = self._tasks[leaf]
            generates = task.OUTPUT_TYPE == "generate_until"
            group.sort(key=lambda e: -sum(len(str(argument)) for argument in e.payload[1][0].arguments))

            def work(batch, rows, task=task):
                adapter.batch_size_per_gpu = rows
                with quiet():
                    _answer(task, adapter, [request for e in batch for request in e.payload[1]])
                    return [self._record(e, task, adapter) for e in batch]

            def tokens(example, task=task, generates=generates):
                prompt = len(adapter.tok_encode(str(example.payload[1][0].arguments[0])))
                return min(prompt + (_cap(task, adapter) if generates else 0), lm.max_length)

            for _, record in batches.run(lm, group, self.batch_size, work, tokens, prefill=self.chunk):
                yield record

    def _record(self, example: Example, task, adapter) -> Record:
        leaf, requests = example.payload
        requests = sorted(requests, key=lambda request: request.idx)
        doc, metrics, prediction = requests[0].doc, {}, None
        keep = _averaged(task)
        for number, key in enumerate(requests[0].filtered_resps):
            answers = [request.filtered_resps[key] for request in requests]
            for name, value in task.process_results(doc, answers).items():
                # RULER's metrics are called like lengths, lists only some, and marks those that an example does not have with -1.
                if (value != -1) if name.isdigit() else (name in keep):
                    metrics[name if number == 0 else f"{name}/{key}"] = float(value)
            if number == 0:
                prediction = answers
        main = self.score or ("acc_norm" if "acc_norm" in metrics else next(iter(metrics)))
        if main not in metrics:
            raise Refusal(f"{leaf} has no metric {main}; task.score is one of {', '.join(metrics)}, or null.")
        cut = any(request.arguments[0] in adapter.truncated for request in requests)
        return {
            "id": example.id, "subset": example.subset, "metrics": {"score": 100 * metrics[main], **metrics},
            "prediction": _text(prediction), "target": _plain(task.doc_to_target(doc)),
            "text": requests[0].resps[0] if task.OUTPUT_TYPE == "generate_until" else None,  # before the task's filters
            "score_is": main, "shots": task.config.num_fewshot, "truncated": "left" if cut else None,
            "chance": 100 / len(requests) if main in ("acc", "acc_norm") and len(requests) > 1 else 0.0,
        }  # fmt: skip

    def _all_leaves(self) -> dict[str, dict]:
        return {leaf: cfg for leaves in self.leaves.values() for leaf, cfg in leaves.items()}

    def _shots(self, leaf: str, task) -> None:
        """lm-eval's rule: the number asked for, else the task's own, else 0; a task that fixes 0 shots keeps 0."""
        owner = next(name for name, leaves in self.leaves.items() if leaf in leaves)
        asked = self.num_fewshot.get(owner) if isinstance(self.num_fewshot, dict) else self.num_fewshot
        own = task.config.num_fewshot
        if asked and own == 0:
            raise Refusal(f"{leaf} fixes its number of shots at 0 (its prompt holds its own); drop it from task.num_fewshot.")
        task.set_config("num_fewshot", own or 0 if asked is None else asked)

    def _load(self, name: str, sources: dict) -> None:
        from kvq.lmeval import load_task, quiet, task_config

        hub = []
        for leaf, entry in ((leaf, self.manager.task_index[leaf]) for leaf in self.leaves[name]):
            if self.leaves[name][leaf].get("custom_dataset"):
                config = dict(task_config(entry.yaml_path))
                config["metadata"] = {**(config.get("metadata") or {}), **self.metadata}
                task = self._tasks[leaf] = load_task(config, taskdata.made(leaf, str(entry.yaml_path), json.dumps(self.metadata, sort_keys=True), self.fewshot_seed))
                # A changed draw must change the run's name.
                sources[leaf] = hashlib.sha256(json.dumps([_plain(list(doc.values())) for doc in task.eval_docs]).encode()).hexdigest()[:16]
            elif self.data == "hub":
                hub.append(leaf)
            else:
                config = dict(task_config(entry.yaml_path))
                if self.data == "embedded":
                    splits = taskdata.embedded(leaf, config, sources, self.seed)
                else:
                    splits = taskdata.of_folder(Path(self.data).expanduser(), leaf, config, sources, OFFLINE)
                try:
                    self._tasks[leaf] = load_task(config, splits)
                except KeyError as error:
                    raise Refusal(f"task.data={self.data}: the rows of {leaf} lack the column {error}. Give the task's upstream columns.") from error
        if hub:
            try:
                with quiet():
                    loaded = self.manager.load([name])["tasks"]
            except (ImportError, LookupError, OSError, ValueError) as error:
                raise Refusal(f"lm-eval's {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
            self._tasks.update({leaf: loaded[leaf] for leaf in hub})


def _answer(task, adapter, requests) -> None:
    """Run the requests of one task through the model and its filters."""
    for request in requests:
        request.resps.clear()
    kind = requests[0].request_type
    repeated = [request for request in requests for _ in range(request.repeats or 1)]
    for request, answer in zip(repeated, getattr(adapter, kind)(repeated, disable_tqdm=True), strict=True):
        request.resps.append(answer)
    for ensemble in task._filters:
        ensemble.apply(requests)


def _cap(task, adapter) -> int:
    """New tokens at most, the task's own or lm-eval's 256."""
    return (task.config.generation_kwargs or {}).get("max_gen_toks", adapter.max_gen_toks)


def _averaged(task) -> list[str]:
    """Metrics whose value over a set is the mean over examples, RULER's own averaging per length included."""
    from lm_eval.api.metrics import mean

    return [name for name, aggregate in task.aggregation().items() if aggregate is mean or getattr(aggregate, "__name__", "") == "aggregate_metrics"]


def _leaves(index: dict, name: str) -> dict[str, dict]:
    """Task name to config (functions unresolved) for a task, group or tag, groups unfolded."""
    entry = index[name]
    if entry.tags and entry.cfg is None:
        return {leaf: index[leaf].cfg for leaf in sorted(entry.tags)}
    if "group" not in entry.cfg:
        return {name: entry.cfg}
    leaves = {}
    for child in entry.cfg["task"]:
        child_name = child if isinstance(child, str) else child.get("task", child.get("group"))
        if child_name not in index:
            raise Refusal(f"The group {name} defines tasks of its own ({child_name}); name one of lm-eval's single tasks instead.")
        leaves.update(_leaves(index, child_name))
    return leaves


def _pooled(config: dict | None) -> bool:
    """Whether lm-eval scores this group by the mean over all its examples."""
    metrics = (config or {}).get("aggregate_metric_list") or []
    metrics = [metrics] if isinstance(metrics, dict) else metrics
    return bool(metrics) and all(metric.get("weight_by_size", True) for metric in metrics)


def _text(answers: list) -> str:
    """What was scored, as text: the answer, or the likelihoods of the choices in nats."""
    if len(answers) == 1 and isinstance(answers[0], str):
        return answers[0]
    return json.dumps(_plain(answers))


def _plain(value):
    """JSON-ready."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
