"""Tables of a sweep's trials: the Pareto front, the setting to use, the best of each method.

Rows are dicts in the columns of `hamu.training.records.TRIAL_SCHEMA`. The axes are the paper view, from the original
model: `forget_quality` = rise of the forget loss (nats), `retain_utility` = minus the rise of the retain loss (nats).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from hamu.training.records import SPLITS

Row = Mapping[str, Any]

AXES = ("forget_quality", "retain_utility")
MAX_RETAIN_ACCURACY_LOSS = 0.01
"""Share of retain rows that a recommended setting may get wrong beyond the original's."""

SETTINGS = ("method", "learning_rate", "constraint_ratio", "forget_set", "rho", "seed")
_SHORT = {"learning_rate": "lr", "constraint_ratio": "ratio"}


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a cell holds a finite number (null, nan and infinity do not)."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def status_of(row: Row) -> str:
    """ "finished", "failed" or "pruned"; a row without status counts as failed when it carries an error."""
    return row.get("status") or ("failed" if row.get("error") else "finished")


def comparable(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The trials that a front is made of: ended without error, both axes finite."""
    ended = (row for row in rows if status_of(row) == "finished")
    return [dict(row) for row in ended if all(is_finite(row.get(axis)) for axis in AXES)]


def pareto_front(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The trials that no other beats on both axes, O(n log n).

    Trial a beats b when it is at least as good on both axes and better on one. Of trials at one and the same point the
    first is kept, so the front's points are distinct. Failed and pruned trials and non-finite points are left out.

    Returns:
        Copies of rows, by rising forget_quality (so by falling retain_utility).
    """
    candidates = sorted(comparable(rows), key=lambda row: (-row["forget_quality"], -row["retain_utility"]))
    front: list[dict[str, Any]] = []
    for row in candidates:
        if not front or row["retain_utility"] > front[-1]["retain_utility"]:
            front.append(row)
    return front[::-1]


def keeps_retain_accuracy(row: Row) -> bool:
    """Whether retain accuracy was measured and is at most MAX_RETAIN_ACCURACY_LOSS under the original model's."""
    before, after = row.get("original_retain_accuracy"), row.get("retain_accuracy")
    if is_finite(before) and is_finite(after):
        return before - after <= MAX_RETAIN_ACCURACY_LOSS + 1e-12  # the rounding of the difference must not decide
    return False


def recommended(rows: Iterable[Row]) -> dict[str, Any] | None:
    """The setting to use: the most forgetting among those that keep the retain accuracy, and of equals the most useful.

    Kept means: at most MAX_RETAIN_ACCURACY_LOSS under the original's. Forget quality counts up to 2 ln(classes): a loss beyond
    that of a guess says no more about forgetting. Trials without a step are the original and are
    never recommended, nor are those that forgot nothing. None when no trial qualifies.  Source: ours.
    """
    front = [row for row in pareto_front(rows) if row.get("steps") != 0 and row["forget_quality"] > 0]
    kept = [row for row in front if keeps_retain_accuracy(row)]
    return max(kept, key=lambda row: (min(row["forget_quality"], _enough(row)), row["retain_utility"]), default=None)


def _enough(row: Row) -> float:
    """Forget quality from which on more is not better, nats; unbounded where the number of classes is not known."""
    n_classes = row.get("n_classes")
    return 2 * math.log(n_classes) if is_finite(n_classes) and n_classes > 1 else math.inf


def best_settings(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The best trial of each method that took a step, the sweep's recommended one first.

    The best is the recommended one of the method's own trials; where there is none, that of highest retain accuracy.

    Returns:
        Copies of rows with `is_recommended` (the sweep's choice) and `keeps_retain_accuracy` added.
    """
    chosen = recommended(rows)
    best: list[dict[str, Any]] = []
    for method in dict.fromkeys(row.get("method") for row in rows):
        own = [row for row in comparable(rows) if row.get("method") == method and row.get("steps") != 0]
        if own:
            row = recommended(own) or max(own, key=_retain_accuracy)
            is_chosen = chosen is not None and row.get("trial_id") == chosen.get("trial_id")
            best.append({**row, "is_recommended": is_chosen, "keeps_retain_accuracy": keeps_retain_accuracy(row)})
    return sorted(best, key=lambda row: (not row["is_recommended"], not row["keeps_retain_accuracy"], -row["forget_quality"]))


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
    return tuple(name for name in SETTINGS if len(values[name]) > 1)


def setting_text(row: Row, names: Iterable[str] = SETTINGS) -> str:
    """A trial's settings in a few words.

    >>> setting_text({"method": "hamu-q", "learning_rate": 0.01, "constraint_ratio": 0.3}, ("constraint_ratio",))
    'hamu-q, ratio 0.3'
    """
    parts = [str(row.get("method", "?"))]
    for name in names:
        if name != "method" and row.get(name) is not None and row[name] == row[name]:
            parts.append(f"{_SHORT.get(name, name)} {row[name]:g}")
    return ", ".join(parts)


def front_text(rows: Sequence[Row]) -> str:
    """The Pareto front for a terminal, most forgetting first; the axes in nats, `*` marks the setting to use."""
    front, chosen, names = pareto_front(rows), recommended(rows), varying_settings(rows)
    if not front:
        return "no trial has finite results yet"
    width = max(len(setting_text(row, names)) for row in front)
    heads = f"{'forget q.':>9} {'retain u.':>9} {'retain%':>7} {'forget%':>7} {'test%':>7}"
    lines = [f"  {'setting':<{width}}  {heads}  trial"]
    for row in reversed(front):
        mark = "*" if chosen is not None and row.get("trial_id") == chosen.get("trial_id") else " "
        accuracies = (row.get(f"{split}_accuracy") for split in SPLITS)
        shares = " ".join(f"{100 * value:>7.1f}" if is_finite(value) else f"{'-':>7}" for value in accuracies)
        axes = f"{row['forget_quality']:>+9.3g} {row['retain_utility']:>+9.3g}"
        lines.append(f"{mark} {setting_text(row, names):<{width}}  {axes} {shares}  {row.get('trial_id', '')}")
    if chosen is None:
        percent = 100 * MAX_RETAIN_ACCURACY_LOSS
        lines.append(f"no setting forgot and kept retain accuracy within {percent:g} %; try more epochs, or other learning rates")
    return "\n".join(lines)
