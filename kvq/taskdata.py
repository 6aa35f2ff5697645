"""Where the documents of an lm-eval task come from when not from the hub: a folder, the embedded generators, or the task's own maker.

RULER makes its prompts itself, from Python's and numpy's global generators and sized by a tokenizer. Its makers of `ruler_vt` and
`ruler_cwe` look for a prompt that fits in a loop that swallows every exception and has no other way out, so a length below their
template and example (with most tokenizers about 512 to 1,024 tokens) never returns; they are tried in another process first.
"""

import ast
import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from jinja2 import Environment, meta

from kvq.errors import Refusal

PATIENCE = 60.0
"""Seconds for the first prompts of a maker, the start of a process included; a millisecond more per token."""
TRY = """
import sys
from lm_eval.tasks.ruler.common_utils import get_tokenizer
kind, tokenizer, length = sys.argv[1], get_tokenizer(sys.argv[2]), int(sys.argv[3])
if kind == "ruler_vt":
    from lm_eval.tasks.ruler.vt_utils import sys_vartrack_w_noise_random as make
    example = make(tokenizer=tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
    make(tokenizer=tokenizer, num_samples=20, max_seq_length=length, icl_example=example)
else:
    from lm_eval.tasks.ruler.cwe_utils import sys_word_pair_random as make
    make(tokenizer=tokenizer, num_samples=20, max_seq_length=length)
"""
ENDLESS = ("ruler_vt", "ruler_cwe")


@functools.lru_cache(maxsize=64)
def made(leaf: str, path: str, metadata: str, seed: int) -> dict:
    """{split: Dataset} that a task makes itself, drawn from `seed`, once per process. metadata: JSON of what it asks for.

    Raises Refusal if the maker needs a missing package, or finds no prompt of the length asked for.
    """
    from kvq.lmeval import quiet, seeded, task_config

    maker, options = task_config(path)["custom_dataset"], json.loads(metadata)
    for length in options.get("max_seq_lengths", []) if leaf in ENDLESS else []:
        _try(leaf, str(options.get("tokenizer")), length)
    own = getattr(sys.modules[maker.__module__], "RNG", None)  # cwe_utils keeps a generator of its own that runs on from call to call
    if own is not None:
        own.seed(seed)
    try:
        with quiet(), seeded(seed):
            return maker(**options)
    except (ImportError, LookupError, OSError, ValueError) as error:
        raise Refusal(f"lm-eval's {leaf} cannot make its prompts: {str(error).strip().splitlines()[0]}") from error


@functools.cache
def _try(leaf: str, tokenizer: str, length: int) -> None:
    """Raise Refusal unless the maker comes up with some prompts of 97 % of the length in time."""
    limit = PATIENCE + length / 1000
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        subprocess.run([sys.executable, "-c", TRY, leaf, tokenizer, str(int(0.97 * length))], env=environment, capture_output=True, timeout=limit, check=True)
    except subprocess.TimeoutExpired as error:
        raise Refusal(
            f"lm-eval's {leaf} finds no prompt of {length} tokens: its template and example alone are longer with this tokenizer. "
            "Raise task.metadata.max_seq_lengths (4096 is its shortest standard length) or leave the task out of task.tasks."
        ) from error
    except subprocess.CalledProcessError as error:
        raise Refusal(f"lm-eval's {leaf} cannot make its prompts: {error.stderr.decode().strip().splitlines()[-1]}") from error


def of_folder(folder: Path, leaf: str, config: dict, sources: dict, remedy: str) -> dict:
    """{split: Dataset} from <folder>/<leaf>/<split>.jsonl or .parquet; splits that only shots need may be absent, then unset in `config`.

    Raises Refusal for a missing folder, a missing scored split or a column that the task's prompt names and the rows lack.
    """
    from datasets import Dataset

    from kvq.lmeval import find_file, read_file

    if not (folder / leaf).is_dir():
        raise Refusal(f"task.data={folder} has no folder {leaf}. {remedy}")
    scored = "test_split" if config.get("test_split") else "validation_split"
    splits = {}
    for role in ("training_split", "validation_split", "test_split", "fewshot_split"):
        split = config.get(role)
        if not split:
            continue
        file = find_file(folder / leaf, split)
        if file:
            rows = read_file(file)
            _columns(rows, config, file)
            splits[split] = Dataset.from_list(rows)
            sources[f"{leaf}/{split}"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        elif role == scored:
            raise Refusal(f"{folder / leaf} has no {split}.jsonl or {split}.parquet, the split that {leaf} is scored on.")
        else:
            config[role] = None
    return splits


def _columns(rows: list[dict], config: dict, file: Path) -> None:
    """Raise Refusal if there are no rows, or the first lacks a column that the task's templates name (tasks that rewrite rows check for themselves)."""
    if not rows:
        raise Refusal(f"{file} is empty.")
    if config.get("process_docs"):
        return
    templates = [config.get(name) for name in ("doc_to_text", "doc_to_target", "doc_to_choice")]
    named = set().union(*(meta.find_undeclared_variables(Environment().parse(t)) for t in templates if isinstance(t, str) and "{" in t))
    named |= {t for t in templates if isinstance(t, str) and t.isidentifier()}
    if missing := sorted(named - rows[0].keys()):
        raise Refusal(f"{file} lacks the column {', '.join(missing)}; it has {', '.join(rows[0])}. Give the task's upstream columns.")


@functools.cache
def embedded_version(*modules: str) -> str:
    """16 hex digits over what embedded examples are made from: these modules of kvq.standin, those they import from there, the held-out text."""
    folder, wanted, seen = Path(__file__).parent / "standin", list(modules), {}
    while wanted:
        name = wanted.pop()
        if name in seen or not (folder / f"{name}.py").is_file():
            continue
        seen[name] = (folder / f"{name}.py").read_bytes()
        nodes = [node for node in ast.walk(ast.parse(seen[name])) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvq.standin")]
        wanted += [part for node in nodes for part in (node.module.split(".")[-1], *(alias.name for alias in node.names))]
    texts = [file.read_bytes() for file in sorted(folder.glob("text/heldout*"))]
    return hashlib.sha256(b"".join([*(seen[name] for name in sorted(seen)), *texts])).hexdigest()[:16]


def embedded(leaf: str, config: dict, sources: dict, seed: int) -> dict:
    """{split: Dataset} of a task that has embedded documents; splits are drawn from seeds of their own. Raises Refusal for other tasks."""
    from datasets import Dataset

    if leaf not in EMBEDDED:
        raise Refusal(f"The embedded data has no {leaf}; it has {', '.join(EMBEDDED)}. Pass task.data=hub or a folder with {leaf}/<split>.jsonl.")
    roles = ("test_split", "validation_split", "training_split", "fewshot_split")
    splits = {}
    for number, split in enumerate(dict.fromkeys(config[role] for role in roles if config.get(role))):
        splits[split] = Dataset.from_list(EMBEDDED[leaf](DOCUMENTS, 2 * seed + min(number, 1)))
    sources[leaf] = hashlib.sha256(json.dumps([split.to_list() for split in splits.values()]).encode()).hexdigest()[:16]
    return splits


DOCUMENTS = 200


def _worked(n: int, seed: int) -> list[dict]:
    """Arithmetic in GSM8K's columns."""
    from kvq.standin import arithmetic

    return [{"question": item["problem"], "answer": f"{item['steps']}\n#### {item['answer']}"} for item in arithmetic.generate(n, seed)]


def _boxed(n: int, seed: int) -> list[dict]:
    """Arithmetic in MATH-500's columns."""
    from kvq.standin import arithmetic

    return [{"problem": item["problem"], "solution": arithmetic.solution(item).strip(), "answer": item["answer"]} for item in arithmetic.generate(n, seed)]


def _pairs(n: int, seed: int, options: int) -> list[tuple[str, str, list[str], int]]:
    """(pairs shown, thing asked, classes to choose from, index of the right one) of the embedded multiple choice."""
    from kvq.standin import choices

    found = []
    for item in choices.generate(n, seed, lines=16):
        shown, _, asked = item["context"].rpartition("\n")
        right = item["choices"][item["gold"]]
        few = [right, *(choice for choice in item["choices"] if choice != right)][:options]
        order = sorted(range(len(few)), key=lambda i: item["choices"].index(few[i]))
        found.append((shown, asked, [few[i] for i in order], order.index(0)))
    return found


def _arc(n: int, seed: int) -> list[dict]:
    rows = _pairs(n, seed, 4)
    return [
        {"id": str(i), "question": f"{shown}\nWhat follows {asked}", "choices": {"text": classes, "label": list("ABCD")}, "answerKey": "ABCD"[gold]}
        for i, (shown, asked, classes, gold) in enumerate(rows)
    ]


def _hellaswag(n: int, seed: int) -> list[dict]:
    rows = _pairs(n, seed, 4)
    return [
        {"ind": i, "activity_label": "Pairs", "ctx_a": f"{shown}\n{asked}", "ctx_b": "", "ctx": f"{shown}\n{asked}", "endings": classes, "label": str(gold)}
        for i, (shown, asked, classes, gold) in enumerate(rows)
    ]


def _piqa(n: int, seed: int) -> list[dict]:
    return [
        {"goal": f"{shown}\nWhat follows {asked}", "sol1": classes[0], "sol2": classes[1], "label": gold}
        for shown, asked, classes, gold in _pairs(n, seed, 2)
    ]  # fmt: skip


EMBEDDED = {"gsm8k": _worked, "hendrycks_math500": _boxed, "arc_challenge": _arc, "hellaswag": _hellaswag, "piqa": _piqa}
"""Task of lm-eval to a function (n, seed) that makes rows in its upstream columns."""
