"""One run's finished examples as JSONL: each line on disk before the next example starts, each with a checksum of its own."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from kvq import results
from kvq.errors import Refusal

CHECK = "check"
"""Key of the checksum, the last of a line; files of earlier versions have none."""


class Damaged(Refusal):
    """A line is not what was written."""


def line(record: dict) -> str:
    """The record as one line of JSON with its checksum."""
    text = json.dumps(record)
    return f'{text[:-1]}, "{CHECK}": "{_digest(text)}"}}\n'


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(path: Path) -> list[dict]:
    """All records of a file, without their checksums. Raises Damaged on a bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise Damaged(_remedy(path, 0)) from error
    records = []
    for number, text in enumerate(lines, 1):
        records.append(_parse(text, path, number))
    checked = [CHECK in record for record in records]
    if any(checked) and not all(checked):
        raise Damaged(_remedy(path, checked.index(False) + 1))
    for record in records:
        record.pop(CHECK, None)
    return records


def _parse(text: str, path: Path, number: int) -> dict:
    try:
        record = json.loads(text)
        if not isinstance(record, dict) or not {"id", "subset", "metrics", "usage"} <= set(record):
            raise ValueError("not a record")
        if not text.endswith("\n"):
            raise ValueError("not a whole line")
    except ValueError as error:
        raise Damaged(_remedy(path, number)) from error
    if CHECK in record and line({k: v for k, v in record.items() if k != CHECK}) != text:
        raise Damaged(_remedy(path, number))
    return record


def _remedy(path: Path, number: int) -> str:
    return f"{path} holds a damaged line ({number}); delete it and run again with force=true."


def resume(path: Path, batch: int | None, total: int) -> list[dict]:
    """The whole records of an unfinished run of `total` examples, after dropping what a kill left half done. Raises Damaged on a bad line.

    Half done are a torn last line and a last batch with fewer than `batch` records: a batch's usage is booked with its first record, so
    what is missing of a batch cannot be computed alone.
    """
    if not path.is_file():
        return []
    text = path.read_bytes()
    _keep(path, text[: text.rfind(b"\n") + 1])
    records = read(path)
    if len(records) < total and records:
        start = max(i for i, record in enumerate(records) if i == 0 or "tokens" in record["usage"])
        if not isinstance(batch, int) or len(records) - start < batch:
            records = records[:start]
            _keep(path, b"".join(path.read_bytes().splitlines(keepends=True)[:start]))
    return records


def _keep(path: Path, whole: bytes) -> None:
    if whole != path.read_bytes():
        results.replace(path, lambda temporary: temporary.write_bytes(whole))


def append(path: Path, records: Iterable[dict]) -> None:
    """Write records as they come, each flushed before the next is asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as stream:
        for record in records:
            stream.write(line(record))
            stream.flush()
