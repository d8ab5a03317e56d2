"""JSON that every reader takes, and a checksum inside it by which a broken file is told from a whole one."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

CHECK = "sha256"

_TAIL = re.compile(r',?\n "sha256": "([0-9a-f]{64})"\n\}\n?\Z')
_TAIL_CHARS = 90  # at most, of the above


def plain(value: Any) -> Any:
    """Turn a value into what JSON can say: numpy numbers into Python's, NaN and infinities into None, others into text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return str(value)  # an enum's value, not its name
    if isinstance(value, (bool, int)) or value is None:
        return value
    if hasattr(value, "__index__"):
        return int(value)
    if hasattr(value, "__float__"):
        number = float(value)
        return number if math.isfinite(number) else None
    return str(value)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Write a value as JSON text, in which NaN and infinities are null (they are no JSON)."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def checked_text(value: Any) -> str:
    """JSON text of a value; of a dict with one entry more, the last: the SHA-256 of the text without it."""
    text = json_text(value, indent=1)
    if not isinstance(value, Mapping):
        return text + "\n"
    assert CHECK not in value, "the entry is the checksum's"
    body = text[:-2] if len(text) > 2 else "{"
    return f'{body}{"," if len(text) > 2 else ""}\n "{CHECK}": "{_digest(text)}"\n}}\n'


def parsed(text: str, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read what `checked_text` wrote, without its checksum; JSON of other hands is taken as it is.

    Args:
        text: of the whole file.
        pairs: makes a dict of its entries, as in `json.loads`.

    Raises:
        ValueError: it is no JSON, or not what its checksum is of.
    """
    value = json.loads(text, object_pairs_hook=pairs)
    if not isinstance(value, dict) or CHECK not in value:
        return value
    said = value.pop(CHECK)
    tail = _TAIL.search(text, max(0, len(text) - _TAIL_CHARS))
    body = text[: tail.start()] if tail else ""
    if tail and _digest("{}" if body == "{" else body + "\n}") == said:
        return value
    if _digest(json_text(value, indent=1)) != said:  # which holds for one that was formatted anew, too
        raise ValueError("its content does not match its checksum")
    return value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
