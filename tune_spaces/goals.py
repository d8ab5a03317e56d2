"""Conditions on a trial's results: what `--target` and `--keep` of a sweep say, such as "forget_accuracy<=retrained".

    condition := metric ("<=" | ">=") reference       reference := (original | retrained | number) [("+" | "-") number]

`original` is the trial's `original_<metric>` column, `retrained` its `retrained_<metric>`, which
`hamu.reports.closeness.with_references` puts there. Spaces may stand anywhere; several conditions are separated by commas.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hamu.errors import ConfigError, unknown
from hamu.reports.rows import is_finite
from hamu.training.records import METRIC_COLUMNS, TRIAL_SCHEMA

CLOSENESS = "forget_closeness"
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_CONDITION = re.compile(
    rf"(?P<metric>\w+)(?P<sign><=|>=)(?P<base>original|retrained|[+-]?{_NUMBER})(?:(?P<shift>[+-]{_NUMBER}))?"
)
_HAS_ORIGINAL = frozenset(name.removeprefix("original_") for name in TRIAL_SCHEMA.names if name.startswith("original_"))


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One condition on one metric.

    Args:
        metric: a column of METRIC_COLUMNS, or the closeness to the retrained model.
        at_most: the metric must be at most the limit; else at least.
        base: "original", "retrained", or None for a number alone.
        shift: added to the base; the limit itself where there is none. In the metric's units.
    """

    metric: str
    at_most: bool
    base: str | None
    shift: float

    @property
    def text(self) -> str:
        """The condition as it is written on a command line."""
        limit = f"{self.shift:g}" if self.base is None else self.base + (f"{self.shift:+g}" if self.shift else "")
        return f"{self.metric}{'<=' if self.at_most else '>='}{limit}"

    def limit(self, row: Mapping[str, Any]) -> float | None:
        """What the metric must reach in this trial; None: the row lacks the reference."""
        if self.base is None:
            return self.shift
        base = row.get(f"{self.base}_{self.metric}")
        return base + self.shift if is_finite(base) else None

    def gap(self, row: Mapping[str, Any]) -> float | None:
        """The signed distance to the limit, in the metric's units: at most 0 when met; None as `violation`."""
        value, limit = row.get(self.metric), self.limit(row)
        if not is_finite(value) or limit is None:
            return None
        return value - limit if self.at_most else limit - value

    def violation(self, row: Mapping[str, Any]) -> float | None:
        """How far a trial is from meeting the condition, over the scale 1: nats of a loss, shares of an accuracy or AUC.

        Returns:
            0 when met; None when the row lacks the metric or its reference, which is not met either.
        """
        gap = self.gap(row)
        if gap is None:
            return None
        return gap if gap > 1e-12 else 0.0  # the rounding of a sum must not decide

    def gap_text(self, row: Mapping[str, Any]) -> str:
        """The condition, and how a trial stands to it, in words."""
        value, limit, miss = row.get(self.metric), self.limit(row), self.violation(row)
        if miss is None:
            lacks = self.metric if not is_finite(value) else f"{self.base}_{self.metric}"
            return f"{self.text} not known (the trial has no {lacks})"
        state = "met" if miss == 0.0 else f"missed by {miss:.3g}"
        return f"{self.text} {state} ({value:.4g}, limit {limit:.4g})"


def parse_condition(text: str, kind: str) -> Condition:
    """Read one condition.

    Args:
        text: "metric<=original|retrained|number [+-number]", spaces allowed.
        kind: where it was given ("target", "keep"), for the message.

    Raises:
        ConfigError: another form, an unknown metric (the nearest is named), or an `original` that is not measured.
    """
    found = _CONDITION.fullmatch(re.sub(r"\s+", "", text))
    if found is None:
        raise ConfigError(
            f"{kind} {text!r}: a condition is metric<=limit or metric>=limit, the limit a number, original or retrained, "
            "with +number or -number behind it if wanted; e.g. retain_accuracy>=original-0.01"
        )
    metric, base = found["metric"], found["base"]
    if metric not in (*METRIC_COLUMNS, CLOSENESS):
        raise ConfigError(f"{kind} {text!r}: {unknown('metric', metric, (*METRIC_COLUMNS, CLOSENESS))}")
    if metric == CLOSENESS and base == "retrained":
        raise ConfigError(f"{kind} {text!r}: the retrained model's closeness to itself is 1; give a number, e.g. 0.9")
    if base == "original" and metric not in _HAS_ORIGINAL:
        raise ConfigError(
            f"{kind} {text!r}: {metric} of the original model is not recorded; it is for "
            f"{', '.join(sorted(_HAS_ORIGINAL))}; give a number or retrained"
        )
    is_reference = base in ("original", "retrained")
    shift = (0.0 if is_reference else float(base)) + float(found["shift"] or 0.0)
    return Condition(metric=metric, at_most=found["sign"] == "<=", base=base if is_reference else None, shift=shift)


def parse_conditions(texts: Iterable[str], kind: str) -> tuple[Condition, ...]:
    """Read conditions given by repeated flags, each one or several separated by commas; errors as `parse_condition`."""
    return tuple(parse_condition(part, kind) for text in texts for part in text.split(","))


def total_violation(conditions: Sequence[Condition], row: Mapping[str, Any]) -> float | None:
    """Sum of the violations; 0: all are met; None: one is not known."""
    misses = [condition.violation(row) for condition in conditions]
    known = [miss for miss in misses if miss is not None]
    return sum(known) if len(known) == len(misses) else None


def goals_text(conditions: Sequence[Condition], row: Mapping[str, Any]) -> str:
    """How a trial stands to each condition, in words, separated by "; "."""
    return "; ".join(condition.gap_text(row) for condition in conditions)
