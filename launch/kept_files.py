"""The JSON files of a sweep that its driver reads again and again: each is read once, and anew when it has changed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hamu.errors import CorruptError
from hamu.storage.files import read_json

_READ_ATTEMPTS = 100

_Stamp = tuple[int, int, int]


class KeptFiles:
    """What was read of files that are replaced whole."""

    def __init__(self) -> None:
        self._read: dict[Path, tuple[_Stamp, dict[str, Any]]] = {}

    def read(self, path: Path) -> dict[str, Any]:
        """The content of a file, which is kept, so do not change it; empty where there is none, or a broken one."""
        for _ in range(_READ_ATTEMPTS):
            try:
                stamp = _stamp(path)
                known = self._read.get(path)
                if known is not None and known[0] == stamp:
                    return known[1]
                value = read_json(path, pairs=_interned)
                if _stamp(path) == stamp:
                    self._read[path] = (stamp, value)
                    return value
            except (FileNotFoundError, NotADirectoryError):
                break  # a resumed trial has just taken it away
            except CorruptError:
                if _stamp_or_none(path) == stamp:
                    break
        self._read.pop(path, None)
        return {}


def _interned(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict whose keys are shared with all others: a thousand rows have the same hundred."""
    return {sys.intern(key): value for key, value in pairs}


def _stamp(path: Path) -> _Stamp:
    """What a file that is replaced whole has another of."""
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size


def _stamp_or_none(path: Path) -> _Stamp | None:
    try:
        return _stamp(path)
    except OSError:
        return None
