"""The row of a trial that has ended, and the words for an error in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hamu.errors import CorruptError
from hamu.storage import mount
from hamu.storage.files import read_json


def said(error: BaseException) -> str:
    """An error in one line: its type and its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


def memory_words(*, peak: int, estimate: int | None) -> str:
    """Peak and estimate of a process's memory, both in bytes, in a few words; on a CPU the peak is that of the whole process."""
    words = f"peak {peak / 2**20:.0f} MiB"
    return words if estimate is None else f"{words}, estimate {estimate / 2**20:.0f} MiB besides the libraries"


def read_row(path: Path) -> dict[str, Any]:
    """A trial's row.json, as it is in the store too; empty where there is none, or a broken one."""
    mount.look(path)
    try:
        return read_json(path)
    except (OSError, CorruptError):
        return {}


def plain_metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a row or a report that Tune is told: numbers and short texts."""
    return {key: value for key, value in row.items() if isinstance(value, (bool, int, float, str)) and key != "config"}


def numbers(report: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a report that are numbers."""
    return {key: value for key, value in report.items() if isinstance(value, (bool, int, float))}
