"""When trials of a sweep ran: runs.json, an entry for each run of the sweep that began one. The pauses between cost nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hamu.errors import CorruptError
from hamu.storage import files, mount

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
        self._is_full = False

    def __enter__(self) -> Runs:
        self._started_at = time.time()
        return self

    def __exit__(self, *exception: object) -> None:
        self._write()

    def note(self) -> None:
        """Trials are running, or the last one has just ended. A storage that is full is said once, and not waited for."""
        self._ended_at = time.time()
        if time.monotonic() < self._write_after:
            return
        try:
            self._write(wait=files.unwilling)
            self._is_full = False
        except files.StorageFullError as full:
            self._write_after = time.monotonic() + _WRITE_EVERY_S
            if not self._is_full:
                files.tell(f"{full}; {self._path.name} is not brought up to date meanwhile")
            self._is_full = True

    def _write(self, wait: Callable[[str], None] | None = None) -> None:
        if self._ended_at is not None:
            runs = [*self._before, {"started_at": self._started_at, "ended_at": self._ended_at}]
            files.write_json(self._path, runs, wait=wait)
            self._write_after = time.monotonic() + _WRITE_EVERY_S


def read_runs(path: Path) -> list[dict[str, Any]]:
    """What a runs.json holds; nothing where there is none that can be read."""
    mount.fetch(path)
    try:
        return list(files.read_json(path))
    except (OSError, CorruptError):
        return []


def all_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs of a sweep and of its shares, which may overlap, by their start."""
    mount.fetch(folder, only=lambda name: name.startswith("runs") and name.endswith(".json"))
    runs = [run for path in sorted(folder.glob("runs*.json")) for run in read_runs(path)]
    return sorted(runs, key=lambda run: run["started_at"])
