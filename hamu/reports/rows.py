"""A trial's row as the reports read it: a dict in the columns of TRIAL_SCHEMA, whose cells may be null or not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

Row = Mapping[str, Any]


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a cell holds a finite number (null, nan and infinity do not)."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def status_of(row: Row) -> str:
    """ "finished", "failed", "pruned" or "dropped"; a row without status counts as failed when it carries an error."""
    return row.get("status") or ("failed" if row.get("error") else "finished")


def classes_of(rows: Iterable[Row]) -> int | None:
    """The number of classes that a guess is made among: the largest that a row states, None where none does.

    For texts it is the size of the vocabulary, as a loss is the mean over tokens there.
    """
    return max((int(row["n_classes"]) for row in rows if is_finite(row.get("n_classes")) and row["n_classes"] > 1), default=None)
