"""Tables of a sweep's trials: the Pareto front, the setting to use, the best of each method.

Rows are dicts in the columns of `hamu.training.records.TRIAL_SCHEMA`; the axes are those of a view (hamu/reports/views.py), by
default the reference view where the trials were compared with retrained models, else the paper view.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from hamu.reports.rows import Row, is_finite, status_of
from hamu.reports.timing import is_timing, timing_text
from hamu.reports.views import View, view_of
from hamu.training.records import SPLITS

__all__ = [
    "MAX_RETAIN_ACCURACY_LOSS", "SETTINGS", "Row", "best_settings", "comparable", "front_text", "is_finite",
    "keeps_retain_accuracy", "pareto_front", "recommended", "setting_text", "status_of", "varying_settings",
]  # fmt: skip

MAX_RETAIN_ACCURACY_LOSS = 0.01
"""Share of retain rows that a recommended setting may get wrong beyond the original's."""

SETTINGS = ("method", "learning_rate", "constraint_ratio", "forget_set", "rho", "seed")
_SHORT = {"learning_rate": "lr", "constraint_ratio": "ratio"}


def comparable(rows: Iterable[Row], view: View | None = None) -> list[dict[str, Any]]:
    """The trials that a front is made of: ended without error, both axes of the view finite."""
    rows = list(rows)
    axes = (view or view_of(rows)).axes
    return [dict(row) for row in rows if status_of(row) == "finished" and all(is_finite(row.get(axis)) for axis in axes)]


def pareto_front(rows: Iterable[Row], view: View | None = None) -> list[dict[str, Any]]:
    """The trials that no other beats on both axes, O(n log n).

    Trial a beats b when it is at least as good on both axes and better on one. Of trials at one and the same point the
    first is kept, so the front's points are distinct. Failed, pruned and dropped trials and non-finite points are left out.

    Returns:
        Copies of rows, by rising forgetting (so by falling retain_utility).
    """
    rows = list(rows)
    view = view or view_of(rows)
    x, y = view.axes
    front: list[dict[str, Any]] = []
    for row in sorted(comparable(rows, view), key=lambda row: (-row[x], -row[y])):
        if not front or row[y] > front[-1][y]:
            front.append(row)
    return front[::-1]


def keeps_retain_accuracy(row: Row) -> bool:
    """Whether retain accuracy was measured and is at most MAX_RETAIN_ACCURACY_LOSS under the original model's."""
    before, after = row.get("original_retain_accuracy"), row.get("retain_accuracy")
    if is_finite(before) and is_finite(after):
        return before - after <= MAX_RETAIN_ACCURACY_LOSS + 1e-12  # the rounding of the difference must not decide
    return False


def recommended(rows: Iterable[Row], view: View | None = None) -> dict[str, Any] | None:
    """The setting to use: the most forgetting among those that keep the retain accuracy, and of equals the most useful.

    Kept means: at most MAX_RETAIN_ACCURACY_LOSS under the original's. In the paper view forget quality counts to 2 ln(classes):
    a loss beyond that of a guess says no more about forgetting; in the reference view more means nearer to the retrained model.
    Trials without a step are the original and are never recommended, nor are those that forgot nothing. None when no trial
    qualifies.  Source: ours.
    """
    rows = list(rows)
    view = view or view_of(rows)
    front = [row for row in pareto_front(rows, view) if row.get("steps") != 0 and row[view.axes[0]] > 0]
    kept = [row for row in front if keeps_retain_accuracy(row)]
    return max(kept, key=lambda row: (view.forgetting(row) or 0.0, row["retain_utility"]), default=None)


def best_settings(rows: Sequence[Row], view: View | None = None) -> list[dict[str, Any]]:
    """The best trial of each method that took a step, the sweep's recommended one first.

    The best is the recommended one of the method's own trials; where there is none, that of highest retain accuracy.

    Returns:
        Copies of rows with `is_recommended` (the sweep's choice) and `keeps_retain_accuracy` added.
    """
    view = view or view_of(rows)
    chosen = recommended(rows, view)
    best: list[dict[str, Any]] = []
    for method in dict.fromkeys(row.get("method") for row in rows):
        own = [row for row in comparable(rows, view) if row.get("method") == method and row.get("steps") != 0]
        if own:
            row = recommended(own, view) or max(own, key=_retain_accuracy)
            is_chosen = chosen is not None and row.get("trial_id") == chosen.get("trial_id")
            best.append({**row, "is_recommended": is_chosen, "keeps_retain_accuracy": keeps_retain_accuracy(row)})
    return sorted(best, key=lambda row: (not row["is_recommended"], not row["keeps_retain_accuracy"], -row[view.axes[0]]))


def _retain_accuracy(row: Row) -> float:
    accuracy = row.get("retain_accuracy")
    return accuracy if is_finite(accuracy) else -math.inf


def varying_settings(rows: Iterable[Row]) -> tuple[str, ...]:
    """The settings that take more than one value over the trials (of those that have one), in the order of SETTINGS."""
    values: dict[str, set[Any]] = {name: set() for name in SETTINGS}
    for row in rows:
        for name in SETTINGS:
            if row.get(name) is not None and row[name] == row[name]:
                values[name].add(row[name])
    if len(values["forget_set"]) == len(values["rho"]):
        values["forget_set"].clear()  # rho tells them apart, in fewer letters
    return tuple(name for name in SETTINGS if len(values[name]) > 1)


def setting_text(row: Row, names: Iterable[str] = SETTINGS) -> str:
    """A trial's settings in a few words.

    >>> setting_text({"method": "hamu-q", "learning_rate": 0.01, "constraint_ratio": 0.3}, ("constraint_ratio",))
    'hamu-q, ratio 0.3'
    """
    parts = [str(row.get("method", "?"))]
    for name in names:
        if name != "method" and (value := row.get(name)) is not None and value == value:
            is_bare = isinstance(value, str) and name in SETTINGS
            shown = f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
            parts.append(shown if is_bare else f"{_SHORT.get(name, name)} {shown}")
            if name == "constraint_ratio" and row.get("relative_constraint"):
                parts[-1] += " of S"
    return ", ".join(parts)


def with_settings(rows: Iterable[Row], names: Iterable[str]) -> list[dict[str, Any]]:
    """Copies of the rows with settings that have no column of their own, read from each trial's configuration."""
    lacking = [name for name in names if name not in SETTINGS]
    told = [dict(row) for row in rows]
    for row in told if lacking else ():
        config = json.loads(row.get("config") or "{}")
        row |= {name: config.get(name) for name in lacking if name not in row}
    return told


def front_text(rows: Sequence[Row], view: View | None = None, names: Sequence[str] | None = None) -> str:
    """The Pareto front for a terminal, most forgetting first; `*` marks the setting to use.

    Losses in nats; the reference view has a column of closeness besides. A sweep that measured times alone gives those.
    names: of the settings to tell, columns or flags; default: those that vary.
    """
    view = view or view_of(rows)
    if is_timing(rows):
        return timing_text(rows)
    names = varying_settings(rows) if names is None else names
    front, chosen = with_settings(pareto_front(rows, view), names), recommended(rows, view)
    if not front:
        return "no trial has finite results yet"
    columns = {"forget_closeness": "closeness"} if view.name == "reference" else {}
    columns |= {"forget_quality": "forget q.", "retain_utility": "retain u."}
    width = max(len(setting_text(row, names)) for row in front)
    heads = f"{' '.join(f'{head:>9}' for head in columns.values())} {'retain%':>7} {'forget%':>7} {'test%':>7}"
    lines = [f"  {'setting':<{width}}  {heads}  trial"]
    for row in reversed(front):
        mark = "*" if chosen is not None and row.get("trial_id") == chosen.get("trial_id") else " "
        accuracies = (row.get(f"{split}_accuracy") for split in SPLITS)
        shares = " ".join(f"{100 * value:>7.1f}" if is_finite(value) else f"{'-':>7}" for value in accuracies)
        axes = " ".join(f"{row[name]:>+9.3g}" if is_finite(row.get(name)) else f"{'-':>9}" for name in columns)
        lines.append(f"{mark} {setting_text(row, names):<{width}}  {axes} {shares}  {row.get('trial_id', '')}")
    if chosen is None:
        percent = 100 * MAX_RETAIN_ACCURACY_LOSS
        lines.append(f"no setting forgot and kept retain accuracy within {percent:g} %; try more epochs, or other learning rates")
    return "\n".join(lines)
