"""What a run tells an experiment tracker while it goes on. `logger=none` is this file; `logger=wandb` is kvq.wandb_logger."""

from collections.abc import Iterator
from contextlib import contextmanager


class Silent:
    """Tells nobody. The other loggers have these methods."""

    @contextmanager
    def run(self, cell) -> Iterator["Silent"]:
        """Around one computed cell (kvq.cell.Cell); an exception passes through and marks the run as failed."""
        yield self

    def resume(self, records: list[dict], total: int) -> None:
        """Records that were finished before, and how many examples there are."""

    def example(self, record: dict) -> None:
        """One more finished example, already on disk."""

    def finish(self, frame, records: list[dict]) -> None:
        """The rows as written, and all records."""
