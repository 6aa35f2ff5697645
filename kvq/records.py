"""What a task hands to the runner: the examples it will run and one JSON-ready record per finished example."""

from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict


@dataclass(frozen=True)
class Example:
    """One unit of work. `id` is stable and unique within the task, so a stopped run resumes by it; `payload` is the task's own."""

    id: str
    subset: str
    payload: Any


class Record(TypedDict):
    """One finished example, as appended to the predictions file; tasks may add keys of their own.

    metrics: name to number, averaged over examples per subset.
    prediction: what was scored, text or None. target: the reference, as the data has it.
    weight: how much the example counts in means (scored tokens of a window); 1 if absent.
    cluster: the problem this is a repeat of. chance: what guessing scores, in the main metric's unit; 0 if absent.
    """

    id: str
    subset: str
    metrics: dict[str, float]
    prediction: NotRequired[str | None]
    target: NotRequired[Any]
    weight: NotRequired[float]
    cluster: NotRequired[str]
    chance: NotRequired[float]
