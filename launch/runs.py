"""When trials of a sweep ran: runs.json, an entry for each run of the sweep that began one. The pauses between cost nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from launch.results import write_json

_WRITE_EVERY_S = 5.0


class Runs:
    """The entry of this run, beside those of former ones: {"started_at", "ended_at"}, unix seconds.

    A run starts when this context is entered, as the first slot is asked for, and ends with the last word of a trial. It is
    written every few seconds, so that one that is killed has an entry too.

    Args:
        path: runs.json.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._before = path, read_runs(path)
        self._started_at = time.time()
        self._ended_at: float | None = None
        self._write_after = 0.0

    def __enter__(self) -> Runs:
        self._started_at = time.time()
        return self

    def __exit__(self, *exception: object) -> None:
        self._write()

    def note(self) -> None:
        """Trials are running, or the last one has just ended."""
        self._ended_at = time.time()
        if time.monotonic() >= self._write_after:
            self._write()

    def _write(self) -> None:
        if self._ended_at is not None:
            write_json(self._path, [*self._before, {"started_at": self._started_at, "ended_at": self._ended_at}])
            self._write_after = time.monotonic() + _WRITE_EVERY_S


def read_runs(path: Path) -> list[dict[str, Any]]:
    """What a runs.json holds; nothing where there is none that can be read."""
    try:
        return list(json.loads(path.read_text()))
    except (OSError, ValueError):
        return []
