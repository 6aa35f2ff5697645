"""The tokenised corpus on disk: every training source once, code and prose apart, made by as many processes as there are cores."""

import hashlib
import json
import multiprocessing
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from kvq.standin import corpus, prose

BOS, EOS = 0, 1
KEPT = 12


@cache
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.from_file(f"{folder}/tokenizer.json")


def _work(job: tuple[str, Path, str]) -> tuple | None:
    path, where, folder = job
    text = corpus.read(where)
    if path == "pydoc_data/topics.py":
        text = where.read_text()
        written = prose.topics(text)
    elif text is None:
        return None
    else:
        written = [extracted] if (extracted := prose.extract(text)) else []
    encoded = [np.array([BOS, *row.ids, EOS], np.uint16) for row in _tokenizer(folder).encode_batch_fast([text, *written], add_special_tokens=False)]
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
    keep = text if digest[0] % KEPT == 0 else None
    return path, digest, encoded[0], encoded[1:], keep, written


def build(folder: Path, tokenizer: Path, processes: int, every: int = 1) -> dict[str, int]:
    """Write code.npy and prose.npy (uint16 tokens) and texts.json (paragraph sources, code for the tasks); returns token counts. ``every`` thins the files."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(path, where, str(tokenizer)) for path, where in corpus.files()][::every]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        made = [result for result in pool.imap_unordered(_work, jobs, chunksize=32) if result]
    made.sort(key=lambda result: result[0])
    seen = {digest for path, digest, *_ in made if corpus.held_out(path)}
    tokens: dict[str, list[np.ndarray]] = {"code": [], "prose": []}
    texts: dict[str, list[str]] = {"code": [], "prose": []}
    for path, digest, code, written, keep, english in made:
        if digest in seen:
            continue
        seen.add(digest)
        tokens["code"].append(code)
        tokens["prose"] += written
        texts["prose"] += english
        if keep:
            texts["code"].append(keep)
    for kind, rows in tokens.items():
        np.save(folder / f"{kind}.npy", np.concatenate(rows))
    (folder / "texts.json").write_text(json.dumps(texts))
    return {kind: sum(map(len, rows)) for kind, rows in tokens.items()}
