"""One cell by several processes: each scores a stretch of the examples (parts=2 part=0,1), and whichever ends last writes the rows.

A stretch is contiguous, because neighbours share contexts that are read once. Parts meet in outputs/partial alone, so they may run
under any launcher, on one machine or several, at the same time or one after the other.
"""

from pathlib import Path

from kvq import predictions
from kvq.errors import Refusal


def check(part: int, parts: int, force: bool = False) -> None:
    """Raises Refusal unless both are whole numbers with 0 <= part < parts, and for force with several parts, which cannot know each other's."""
    if any(isinstance(n, bool) or not isinstance(n, int) for n in (part, parts)) or not 0 <= part < parts:
        raise Refusal(f"part={part} parts={parts}: part counts from 0 to parts - 1; a whole cell is parts=1 part=0.")
    if force and parts > 1:
        raise Refusal("force=true repeats a whole cell; delete its files in results/runs and outputs/partial to repeat it in parts.")


def suffix(part: int, parts: int) -> str:
    """What tells a part's files and claims from those of a whole cell."""
    return f".{part}of{parts}" if parts > 1 else ""


def stretch(examples: list, part: int, parts: int) -> list:
    """The examples of one part, in order; stretches of all parts are disjoint and leave nothing out."""
    return examples[len(examples) * part // parts : len(examples) * (part + 1) // parts]


def gather(files: list[Path], examples: list) -> list[dict] | None:
    """Records of all examples in order from the files of all parts; None while one of them is unfinished."""
    records = []
    for part, path in enumerate(files):
        wanted = {example.id for example in stretch(examples, part, len(files))}
        if not path.is_file() or path.read_bytes().count(b"\n") < len(wanted):  # counted first: a line may be half written
            return None
        records += predictions.read(path)
    by_id = {record["id"]: record for record in records}
    return [by_id[example.id] for example in examples] if all(e.id in by_id for e in examples) else None
