"""What a run needs to go on as if it had never stopped, in one file that is complete whenever it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hamu.errors import CheckpointError
from hamu.training.records import replacing


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them; a killed process leaves the last complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, tensors on the CPU; nothing but tensors and plain values is unpickled.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a broken file
        raise CheckpointError(
            f"checkpoint {str(path)!r} cannot be read ({type(error).__name__}); a checkpoint is one file written by this "
            "program: remove it to start the run again"
        ) from error
