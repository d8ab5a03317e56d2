"""Errors that a user can mend: each message names the value given, the rule, and the mend, on one line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class HamuError(Exception):
    """Base of every error that is the input's fault; the command line prints it without a traceback and exits with 2."""


class ConfigError(HamuError):
    """A setting is unknown, out of range, or does not go with another."""


class DataError(HamuError):
    """A dataset, a column or a forget set is not what the settings say."""


class CheckpointError(HamuError):
    """A model folder or a checkpoint is missing, broken or of another run."""


class CorruptError(DataError, CheckpointError):
    """A file of ours is not as it was written: cut, or changed since. It has been named, and nothing of it is used.

    Args:
        path: the file.
        why: what is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str], why: str = "not as it was written") -> None:
        super().__init__(f"{os.fspath(path)} is broken and cannot be read ({why}); set it aside, and what it is of is made again")
        self.path, self.why = Path(path), why

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.why)


class LeaseError(ConfigError):
    """A folder is owned by another process, or no longer by this one."""


def unknown(kind: str, value: object, known: Iterable[str]) -> str:
    """Say that a name is not known, with the nearest match and all known names.

    >>> unknown("method", "hamuq", ["hamu-q", "ft"])
    "unknown method 'hamuq'; did you mean 'hamu-q'? Known: ft, hamu-q"
    """
    names = sorted(str(name) for name in known)
    by_lower = {name.lower(): name for name in names}
    near = [by_lower[match] for match in difflib.get_close_matches(str(value).lower(), by_lower, n=1, cutoff=0.5)]
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {value!r}{hint} Known: {', '.join(names)}"
