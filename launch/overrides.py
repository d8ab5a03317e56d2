"""Settings that `--set` gives on top of a space: one value, several as an axis, or a range of values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hamu.errors import ConfigError
from hamu.training.config import ALIASES, KNOWN
from hamu.training.fields import read_value, unknown_key
from tune_spaces.space import ORIGINAL_PREFIX

DECIDED = {
    "artifact_root": "--storage-path", "output_dir": "--name", "final_model_output_dir": "--name", "resume": "--resume",
    "dry_run": "--dry-run", "fetch": "--fetch", "device": "--gpus (0 for the cores)", "debug": "no flag",
    "ray_address": "no flag",
}  # fmt: skip
"""What a sweep decides itself, and the flag that says it."""

_N_IN_RANGE = 9
_DIGITS = 4
_BY_RATIO_FROM = 4.0  # a range whose ends are at least so far apart is spaced by ratio
_RANGE = re.compile(r"(?P<low>.+?)\.\.(?P<high>[^:]+)(:(?P<n>.*))?")


def read_overrides(assignments: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """Read `--set` arguments, "key=value", "key=value,value" or "key=low..high:n"; the last one of a key counts.

    A range of a number is n values (default 9) from low to high: spaced by ratio where both are above 0 and high is at least
    4 times low, else evenly; rounded to 4 digits, or to whole numbers that differ.

    Raises:
        ConfigError: no "=", an unknown key (the nearest is named), a value or a range that does not fit, or a key that the
            sweep decides.
    """
    overrides: dict[str, tuple[Any, ...]] = {}
    for assignment in assignments:
        raw, equals, text = assignment.partition("=")
        if not equals or not raw.strip():
            raise ConfigError(f"--set {assignment!r}: a setting is key=value, or key=value,value for an axis")
        prefix = ORIGINAL_PREFIX if raw.strip().startswith(ORIGINAL_PREFIX) else ""
        key = raw.strip().removeprefix(prefix).replace("-", "_")
        key = ALIASES.get(key, key)
        if key not in KNOWN:
            raise ConfigError(unknown_key(key, (*KNOWN, *ALIASES), prefix=prefix))
        if key in DECIDED:
            raise ConfigError(f"--set {key}: the sweep decides it; use {DECIDED[key]}")
        kind, optional = KNOWN[key]
        if kind is list:
            overrides[prefix + key] = (read_value(key, text, kind, optional),)
            continue
        values: dict[Any, None] = {}
        for part in map(str.strip, text.split(",")):
            if not part:
                raise ConfigError(f"--set {assignment!r}: a value is empty; give {key}=value, or key=value,value for an axis")
            is_range = kind in (int, float) and ".." in part
            values |= dict.fromkeys(_in_range(key, part, kind) if is_range else [read_value(key, part, kind, optional)])
        overrides[prefix + key] = tuple(values)
    return overrides


def _in_range(key: str, text: str, kind: type) -> list[Any]:
    """The values of "low..high:n", ascending, the ends among them.

    >>> _in_range("learning_rate", "0.01..0.16:5", float), _in_range("seed", "1..9:3", int)
    ([0.01, 0.02, 0.04, 0.08, 0.16], [1, 3, 9])
    """
    said = f"--set {key}={text}"
    found = _RANGE.fullmatch(text)
    if found is None:
        raise ConfigError(f"{said}: a range is low..high:n; give e.g. {key}=1..8:4")
    low, high = (read_value(key, found[end], kind, False) for end in ("low", "high"))
    n = read_value(f"n of {said}", found["n"], int, False) if found["n"] is not None else _N_IN_RANGE
    if not -float("inf") < low < high < float("inf"):
        raise ConfigError(f"{said}: a range goes up between two finite numbers; give low < high, or a single value")
    if n < 2:
        raise ConfigError(f"{said}: a range has at least 2 values, got n {n}; give {key}={found['low']} for a single one")
    if kind is int and n > high - low + 1:
        if found["n"] is not None:
            raise ConfigError(f"{said}: there are {high - low + 1} whole numbers from {low} to {high}, not {n}; give fewer")
        n = high - low + 1
    by_ratio = low > 0 and high / low >= _BY_RATIO_FROM
    inner = [low * (high / low) ** (i / (n - 1)) if by_ratio else low + (high - low) * i / (n - 1) for i in range(1, n - 1)]
    values = [low]
    for value in inner:  # the values of a range of whole numbers differ by rounding up where two would be one
        values.append(max(round(value), values[-1] + 1) if kind is int else float(f"{value:.{_DIGITS}g}"))
    values.append(high)
    if any(after <= before for before, after in zip(values, values[1:], strict=False)):
        raise ConfigError(
            f"{said}: {n} values of {_DIGITS} digits do not fit between {low:g} and {high:g}; give fewer, or a list"
        )
    return values
