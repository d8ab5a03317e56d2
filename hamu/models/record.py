"""What a model folder says about how it was made: `record.json`, in JSON that every reader takes. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

RECORD_NAME = "record.json"


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
