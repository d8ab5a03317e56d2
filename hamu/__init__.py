"""HAMU: hardness-aware multi-objective unlearning, its rivals, and the sweeps that choose their settings.

Importing `hamu` is light: torch is imported when a name below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hamu.errors import CheckpointError, ConfigError, DataError, HamuError

if TYPE_CHECKING:
    from hamu.methods.combine import Step, combine_gradients
    from hamu.training.unlearn import Unlearned, unlearn

__version__ = "0.1.0"

_LAZY = {
    "Step": "hamu.methods.combine",
    "combine_gradients": "hamu.methods.combine",
    "unlearn": "hamu.training.unlearn",
    "Unlearned": "hamu.training.unlearn",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HamuError",
    "Step",
    "Unlearned",
    "combine_gradients",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'hamu' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
