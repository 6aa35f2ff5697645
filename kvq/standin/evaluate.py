"""Scores of a stand-in folder through plain transformers: needles, the embedded suite, arithmetic, choices and text loss.

    python -m kvq.standin.evaluate --model kvq/standin/model --lengths 1024 2048 --n 8
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvq.standin import arithmetic, choices, corpus, needles, score, suite, templates

MODEL = Path(__file__).parent / "model"
SEED = 1


def jobs(lengths: Iterable[int]) -> list[tuple[str, str, int]]:
    """(family, name, tokens) of everything that is scored, the most telling first."""
    lengths = list(lengths)
    found = [("text", split, 2048) for split in ("train", "heldout")]
    found += [("needles", "single", tokens) for tokens in lengths]
    middle = [tokens for tokens in lengths if tokens <= 8192]
    found += [("suite", subset, tokens) for tokens in middle if tokens >= 2048 for subset in suite.SUBSETS]
    found += [("needles", kind, tokens) for kind in needles.KINDS[1:] for tokens in lengths]
    return found + [("arithmetic", "steps", 0), ("choices", "recall", 0)]


def cases(job: tuple[str, str, int], n: int, tokenizer) -> list[tuple[str, dict]]:
    """The prompts of a job with what is needed to score them."""
    family, name, tokens = job
    if family == "needles":
        depths = [index % 11 / 10 for index in range(2 * n)]
        return [(made["prompt"], made) for index, depth in enumerate(depths)
                for made in needles.generate(name, 1, tokens, depth, tokenizer, SEED + index)]
    if family == "suite":
        return [(templates.prompt(name, made), made) for made in suite.generate(name, n, tokens, tokenizer, SEED)]
    if family == "arithmetic":
        return [(arithmetic.PROMPT.format(problem=made["problem"]), made) for made in arithmetic.generate(2 * n, SEED)]
    if family == "choices":
        return [(made["context"], made) for made in choices.generate(2 * n, SEED)]
    return [(text, {}) for text in corpus.sample(name)]


@torch.no_grad()
def generate(model, tokenizer, prompts: list[str], new_tokens: int, batch_tokens: int = 65536) -> list[str]:
    """Greedy continuations, batched by tokens, padded on the left."""
    said = []
    step = max(1, batch_tokens // max(len(ids) for ids in tokenizer(prompts)["input_ids"]))
    for start in range(0, len(prompts), step):
        rows = tokenizer(prompts[start:start + step], return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False).to(model.device)
        out = model.generate(**rows, max_new_tokens=new_tokens, do_sample=False)
        said += tokenizer.batch_decode(out[:, rows["input_ids"].shape[1]:], skip_special_tokens=True)
    return said


@torch.no_grad()
def text_loss(model, tokenizer, texts: list[str], length: int) -> tuple[float, int]:
    """Mean loss in nats a token over windows of the joined texts, each window behind a bos token, and the number of tokens."""
    ids = torch.tensor([token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]])
    rows = ids[:len(ids) // length * length].view(-1, length)
    rows = torch.cat((torch.full_like(rows[:, :1], tokenizer.bos_token_id), rows), dim=1)
    total = 0.0
    for part in rows.split(8):
        logits = model(part.to(model.device)).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten().to(model.device), reduction="sum").item()
    return total / rows[:, 1:].numel(), rows[:, 1:].numel()


def run(job: tuple[str, str, int], prepared: list[tuple[str, dict]], model, tokenizer) -> dict:
    """One row: family, name, tokens, n, score (nats for text, otherwise 0 to 1), and one wrong answer if there is any."""
    family, name, tokens = job
    prompts, documents = [prompt for prompt, _ in prepared], [document for _, document in prepared]
    row = {"family": family, "name": name, "tokens": tokens, "n": len(prompts)}
    if family == "text":
        loss, count = text_loss(model, tokenizer, prompts, tokens)
        return {**row, "n": count, "score": loss}
    new_tokens = {"needles": 40, "arithmetic": 110, "choices": 6}.get(family) or suite.NEW_TOKENS[name]
    said = generate(model, tokenizer, prompts, new_tokens)
    if family == "needles":
        scores = [score.needle(text, document["answers"]) for text, document in zip(said, documents, strict=True)]
    elif family == "suite":
        scores = [score.subset(name, text, document) for text, document in zip(said, documents, strict=True)]
    elif family == "arithmetic":
        scores = [float(score.boxed(text) == document["answer"]) for text, document in zip(said, documents, strict=True)]
    else:
        scores = [float(text.strip().split("\n")[0] == document["choices"][document["gold"]]) for text, document in zip(said, documents, strict=True)]
    row["score"] = sum(scores) / len(scores)
    worst = min(range(len(scores)), key=scores.__getitem__)
    if scores[worst] < 1:
        right = documents[worst].get("answers") or documents[worst].get("answer") or documents[worst]["choices"][documents[worst]["gold"]]
        row["miss"] = {"said": said[worst][:300], "right": right, "depth": documents[worst].get("depth")}
    return row


def prepare(folder: Path, n: int, job: tuple[str, str, int]) -> list[tuple[str, dict]]:
    """``cases`` with the tokenizer of a folder, for another process."""
    return cases(job, n, AutoTokenizer.from_pretrained(folder))


def rows(folder: Path, todo: list[tuple[str, str, int]], n: int, device: str, pool) -> Iterator[dict]:
    """A row for each job as soon as it is scored; the prompts are made by the pool's processes meanwhile."""
    model, tokenizer = load(folder, device)
    for job, prepared in zip(todo, pool.imap(partial(prepare, MODEL, n), todo)):
        started = time.monotonic()
        row = run(job, prepared, model, tokenizer)
        print(*job, row["n"], f"{row['score']:.3f}", f"{time.monotonic() - started:.1f} s", flush=True)
        yield row


def load(folder: Path, device: str):
    """(model, tokenizer) in bf16 on a GPU, in float32 on a CPU."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval(), AutoTokenizer.from_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--n", type=int, default=8, help="documents per suite subset; twice as many needles")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="file for the rows, one JSON object a line")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("K", "OF"), help="score every OF-th job only, beginning with the K-th")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    part, of = options.part
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        made = [json.dumps(row) for row in rows(options.model, jobs(options.lengths)[part::of], options.n, options.device, pool)]
    if options.out:
        options.out.write_text("\n".join(made) + "\n")


if __name__ == "__main__":
    main()
