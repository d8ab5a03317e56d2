"""What a run needs to go on as if it had never stopped, in one file that is complete whenever it is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


def changing_state(model: nn.Module) -> dict[str, Tensor]:
    """What a run can change of a model: the parameters that require a gradient and the buffers, by their names in `state_dict`.

    Of a LoRA adapter on a frozen base that is the adapter alone.
    """
    frozen = {name for name, param in model.named_parameters(remove_duplicate=False) if not param.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_changing_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `changing_state` gave of the same model.

    Raises:
        RuntimeError: a tensor is missing, left over, or of another shape.
    """
    here = changing_state(model)
    if here.keys() != state.keys():
        odd = sorted(here.keys() ^ state.keys())
        raise RuntimeError(f"the state has not the model's tensors; of one alone: {', '.join(odd[:3])}{', ...' * (len(odd) > 3)}")
    model.load_state_dict(dict(state), strict=False)
