"""What a setting is: a dataclass field with its help, how a value is read into its type, and the range checks.

Torch-free, as everything that a command line needs before it is known to be right.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from hamu.errors import ConfigError, unknown

_TRUE = ("1", "true", "yes", "y", "on", "t")
_FALSE = ("0", "false", "no", "n", "off", "f", "")


def setting(default: Any, text: str) -> Any:
    """A configuration field: its default, which lives here alone, and its help on the command line.

    A flag that may be unset (default None) and is a switch still takes `--flag` alone: see `switch`.
    """
    return dataclasses.field(default=default, metadata={"help": text.replace("%", "%%")})


def switch(text: str) -> Any:
    """A boolean field with the default "decided by the other settings" (None); `--flag` alone means True."""
    return dataclasses.field(default=None, metadata={"help": text.replace("%", "%%"), "nargs": "?", "const": True})


@cache  # read for each of a plan's hundreds of trials
def settings_of(cls: type) -> dict[str, tuple[type, bool]]:
    """Name of each field of `cls` -> (its plain type: bool, int, float, str or list; whether None is allowed).

    Read from the annotations, not from `dataclasses.fields`, whose `type` the argument parser overwrites. Not to be changed.
    """
    found: dict[str, tuple[type, bool]] = {}
    for name, hint in typing.get_type_hints(cls).items():
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        plain = next(member for member in members if member is not type(None))
        found[name] = (typing.get_origin(plain) or plain, type(None) in members)
    return found


def read_value(name: str, value: Any, kind: type, optional: bool) -> Any:
    """Read `value` (a Python value, or text from the environment or `--set`) as the type of the setting `name`.

    Raises:
        ConfigError: the value cannot be read as `kind` without loss.
    """
    if isinstance(value, str) and kind is not str:
        text = value.strip()
        if optional and text.lower() in ("none", "null", ""):
            return None
        return _read_text(name, text, kind)
    if value is None:
        if optional:
            return None
    elif kind is bool:
        if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
            return bool(value)
    elif kind is int:
        if not isinstance(value, bool) and isinstance(value, (int, float)) and float(value).is_integer():
            return int(value)
        if hasattr(value, "__index__") and not isinstance(value, bool):
            return int(value)
    elif kind is float:
        if not isinstance(value, bool) and hasattr(value, "__float__"):
            return float(value)
    elif kind is list:
        if isinstance(value, (list, tuple)):
            return [str(item) for item in value]
    elif isinstance(value, str):
        return value
    elif hasattr(value, "__fspath__"):
        return str(value)
    raise ConfigError(f"{name} takes {_article(kind)}, got {value!r}")


def _read_text(name: str, text: str, kind: type) -> Any:
    if kind is list:
        return [part for part in text.replace(",", " ").split() if part]
    if kind is bool:
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        raise ConfigError(f"{name} takes true or false, got {text!r}")
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(f"{name} takes {_article(kind)}, got {text!r}") from None
    if kind is int:
        if not number.is_integer():
            raise ConfigError(f"{name} takes a whole number, got {text!r}")
        return int(text) if text.lstrip("+-").isdigit() else int(number)
    return number


def _article(kind: type) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", list: "a list of words", str: "text"}
    return names[kind]


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Refuse a value that is not one of `known`, naming the nearest."""
    if value not in (names := tuple(known)):
        raise ConfigError(unknown(name, value, names))


def check_range(
    name: str,
    value: float | None,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    mend: str = "",
) -> None:
    """Refuse a number that is not finite or lies outside [low, high], or is not above `above`; None is unset: fine."""
    if value is None:
        return
    low_text = f"> {above:g}" if above is not None else (f">= {low:g}" if low is not None else "")
    high_text = f"<= {high:g}" if high is not None else ""
    rule = (
        f"in [{low:g}, {high:g}]"
        if low is not None and high is not None
        else " and ".join(part for part in (low_text, high_text) if part)
    )
    inside = (
        math.isfinite(value)
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
    )
    if not inside:
        raise ConfigError(f"{name} must be {rule or 'finite'}, got {value!r}" + (f"; {mend}" if mend else ""))


def merge_known(given: Mapping[str, Any], known: Mapping[str, tuple[type, bool]], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Turn a flat mapping into one with canonical names and values of the right type.

    Raises:
        ConfigError: a key is unknown (nearest match named), given twice under two names, or its value unreadable.
    """
    merged: dict[str, Any] = {}
    for raw, value in given.items():
        name = str(raw).replace("-", "_")
        name = aliases.get(name, name)
        if name not in known:
            raise ConfigError(unknown_key(str(raw), (*known, *aliases)))
        if name in merged:
            raise ConfigError(f"{name} is given twice, the second time as {raw!r}; give it once")
        merged[name] = read_value(name, value, *known[name])
    return merged


def unknown_key(key: str, known: Iterable[str], kind: str = "key", prefix: str = "") -> str:
    """Say that a setting is not known and which is nearest, without listing all of the hundred."""
    import difflib

    near = difflib.get_close_matches(key.replace("-", "_"), sorted(known), n=1, cutoff=0.5)
    hint = f"did you mean '{prefix}{near[0]}'? " if near else ""
    return f"unknown {kind} '{prefix}{key}'; {hint}All are listed by: python -m hamu.cli.train --help"
