"""Checks of what a configuration points to (model folder, local dataset, class), made before torch is imported.

The loaders check again, and more; this is what can be known without the images and without the network.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hamu.errors import CheckpointError
from hamu.storage import mount
from hamu.tasks.catalog import MODALITIES, is_built_in, modality_of
from hamu.training.artifacts import check_replaceable, holds_model, read_record, recipe_at, trained_model_path
from hamu.training.config import TrainConfig

_BUILT_IN = tuple(name for modality in MODALITIES.values() for name in modality.models)
_HOW_TO_TRAIN = "train it with --unlearning_method none --add_forget_to_train"


def is_local_path(name: str) -> bool:
    """Whether a model or dataset name means a folder: absolute, begins with . or ~, has two separators, or exists.

    The built-in names (`resnet20`, `tiny-llama`, `torchvision/<name>`) never do, whatever lies in the working directory.
    """
    if is_built_in(name, _BUILT_IN):
        return False
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or Path(name).expanduser().exists()


def check_inputs(config: TrainConfig) -> None:
    """Refuse a model folder, a local dataset, one of its columns or splits, or a class that does not exist.

    Raises:
        CheckpointError: `model_name` is a path without a model in it, or `final_model_output_dir` holds something else.
        DataError: the local dataset is missing or lacks a column or split, or its forget set cannot be drawn.
    """
    name = config.run.model_name
    if is_local_path(name):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise CheckpointError(
                f"model_name '{name}' is not a folder; train it first (--unlearning_method none "
                f"--add_forget_to_train --final_model_output_dir '{name}'), or give "
                f"{modality_of(config).models[0]} or a hub name"
            )
        if not holds_model(folder) and not (folder / "record.json").is_file():
            raise CheckpointError(f"model_name '{name}' has no config.json or record.json; give a saved model")
    modality_of(config).check_rows(config)
    reference = config.logging.retain_reference
    if reference is not None and not holds_model(Path(reference).expanduser()):
        raise CheckpointError(
            f"retain_reference '{reference}' is no model folder; give that of a model trained without the forget rows "
            "(--unlearning_method none, without --add_forget_to_train)"
        )
    for flag in ("artifact_root", "output_dir", "final_model_output_dir"):
        if (place := getattr(config.run, flag)) is not None:
            _check_place(flag, Path(place))
    if config.run.final_model_output_dir:
        check_replaceable(Path(config.run.final_model_output_dir))


def _check_place(flag: str, place: Path) -> None:
    """Refuse a folder that could not be made."""
    there = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        kind = "cannot be written to" if there.is_dir() else "is a file"
        raise CheckpointError(f"{flag} {str(place)!r}: {str(there)!r} {kind}, so the folder cannot be made; give another one")


def find_start(config: TrainConfig) -> Path | None:
    """Folder of the model that a run starts from: the one named, or for unlearning the original; None: new or hub weights.

    Raises:
        CheckpointError: unlearning, and there is no original.
    """
    name = config.run.model_name
    if is_local_path(name):
        return Path(name).expanduser()
    if not config.is_unlearning:
        return None
    path = trained_model_path(config, variant="full")
    mount.fetch(path)
    if not path.is_dir():
        others = siblings(path)
        beside = f" (beside it: {', '.join(others)})" if others else ""
        raise CheckpointError(
            f"no original model at {str(path)!r}{beside}: unlearning starts from a trained model; {_HOW_TO_TRAIN}, or give "
            "--model_name the folder of one"
        )
    return path


def check_start(
    config: TrainConfig, *, data_sha256: str | None = None, n_classes: int | None = None, side: int | None = None
) -> Path | None:
    """Find the start model of a run, and refuse an original that is not of this run's data, model or image size.

    What is not given is not compared, so that most is known before torch is imported and the data read.

    Args:
        config: any configuration.
        data_sha256: of the data.
        n_classes: of the data: what `num_labels` is when it is not set.
        side: pixels a side that images have when `img_size` is not set.

    Returns:
        The folder, as `find_start`. One that is named by `model_name` is the user's choice: `start_differences` tells.

    Raises:
        CheckpointError: there is no original, or it is another run's.
    """
    folder = find_start(config)
    if folder is None or is_local_path(config.run.model_name):
        return folder
    if not holds_model(folder):
        raise CheckpointError(f"the folder of the original {str(folder)!r} holds no model; remove it, then {_HOW_TO_TRAIN}")
    found = start_differences(config, folder, data_sha256=data_sha256, n_classes=n_classes, side=side)
    if found:
        others = siblings(folder)
        mend = f"of those beside it ({', '.join(others)})" if others else "of the right one"
        raise CheckpointError(
            f"the original at {str(folder)!r} is not one of this run: {'; '.join(found)}; give --model_name the folder "
            f"{mend}, or {_HOW_TO_TRAIN}"
        )
    return folder


def start_differences(
    config: TrainConfig, folder: Path, *, data_sha256: str | None = None, n_classes: int | None = None, side: int | None = None
) -> list[str]:
    """In what the record of a start model differs from a run, one phrase each; nothing where it has no record of ours.

    Raises:
        CheckpointError: the record cannot be read.
    """
    if recipe_at(folder) is None:
        return []
    record = read_record(folder)
    then = record.get("config", {})
    pairs: list[tuple[str, Any, Any]] = [
        ("num_labels", then.get("num_labels") or n_classes, config.run.num_labels or n_classes),
        ("img_size", then.get("img_size") or side, config.run.img_size or side),
    ]
    if not is_local_path(config.run.model_name):
        pairs.insert(0, ("model_name", then.get("model_name"), config.run.model_name))
    found = [
        f"{name} {theirs!r} there, {ours!r} here" for name, theirs, ours in pairs if None not in (theirs, ours) and theirs != ours
    ]
    if config.is_text:
        same = {name: (then.get(name), getattr(config.data, name)) for name in ("chat_template", "max_length")}
        found += [f"{name} {theirs!r} there, {ours!r} here" for name, (theirs, ours) in same.items() if theirs != ours]
    theirs = record.get("data_sha256")
    if data_sha256 is not None and theirs is not None and theirs != data_sha256:
        found.insert(0, f"it was trained on other data (sha256 {theirs[:8]} there, {data_sha256[:8]} here)")
    return found


def siblings(path: Path) -> list[str]:
    """The models that lie beside a published place, `<name>-<recipe>` each, as paths."""
    return sorted(str(other) for other in path.parent.glob(f"{path.name}-*") if other.is_dir())
