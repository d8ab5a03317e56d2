"""How a model's images are normalised: as its folder says it was trained, as its library's file says, or by the data's pixels."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError

from hamu.errors import CheckpointError
from hamu.hub import one_line, why_not_on_hub
from hamu.models.record import RECORD_NAME

logger = logging.getLogger(__name__)

NORMALISATION = "normalisation"
"""Key of `record.json`: mean and std per channel of the scaled pixels that the model was trained on, and the scale."""
PREPROCESSOR = "preprocessor_config.json"

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def input_statistics(model_name: str) -> Statistics | None:
    """Return the mean and std per channel that a model's images are normalised with; None: it brings none, so the data's own.

    A folder's `record.json` says what it was trained with, else its `preprocessor_config.json`; a hub model has the latter.

    Raises:
        CheckpointError: the file is there, but its numbers cannot be used.
    """
    model_name = os.path.expanduser(model_name)
    if model_name == "resnet20" or model_name.startswith("torchvision/"):
        return None
    folder = Path(model_name)
    if not folder.is_dir():
        file = _hub_file(model_name, PREPROCESSOR)
        return None if file is None else _image_statistics(file)
    if (folder / RECORD_NAME).is_file():
        try:
            used = json.loads((folder / RECORD_NAME).read_text()).get(NORMALISATION)
        except (OSError, ValueError, AttributeError):
            used = None  # a record of another program's; ours is complete when it is there
        if isinstance(used, dict):
            return _statistics(used.get("mean"), used.get("std"), folder / RECORD_NAME)
    return _image_statistics(folder / PREPROCESSOR)


def _image_statistics(file: Path) -> Statistics | None:
    if not file.is_file():
        return None
    try:
        said = json.loads(file.read_text())
        mean, std = said.get("image_mean"), said.get("image_std")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"cannot read {str(file)!r} ({one_line(error)}); mend or remove it") from error
    if said.get("do_normalize") is False:
        return (0.0,), (1.0,)
    return None if mean is None or std is None else _statistics(mean, std, file)


def _statistics(mean: Any, std: Any, file: Path) -> Statistics:
    try:
        means, stds = (
            tuple(float(each) for each in (values if isinstance(values, list) else [values])) for values in (mean, std)
        )
        if len(means) != len(stds) or not means or not all(each > 0 for each in stds):
            raise ValueError("one mean and one positive std a channel are needed")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{str(file)!r} says mean {mean} and std {std} ({one_line(error)}); mend or remove it") from error
    return means, stds


def _hub_file(name: str, file: str) -> Path | None:
    """A file of a hub model, from the cache, else from the hub; None: it has none, or it cannot be had, which is said."""
    found = huggingface_hub.try_to_load_from_cache(name, file)
    if isinstance(found, str):
        return Path(found)
    if found is not None:  # the cache knows that there is none
        return None
    reason = why_not_on_hub(name, "model")
    if reason is None:
        try:
            return Path(huggingface_hub.hf_hub_download(name, file))
        except EntryNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = one_line(error)
    logger.warning("no %s of %s (%s): images are normalised by the dataset's own statistics", file, name, reason)
    return None
