"""A folder that runs write to."""

import os
from pathlib import Path

from kvq.errors import Refusal


def make(folder: Path) -> None:
    """Make `folder` with its parents, if it is not there. Raises Refusal, before anything is computed, where it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else "no permission"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise Refusal(f"{folder} cannot be written ({reason}); results=, outputs= and calibrations= take folders that can.")
