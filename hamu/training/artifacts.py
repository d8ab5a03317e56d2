"""Where things lie under the artifact root, and the record that every model folder carries. Torch-free."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hamu.errors import CheckpointError
from hamu.models.record import RECORD_NAME
from hamu.tasks.catalog import modality_of
from hamu.training.config import TrainConfig
from hamu.training.stop import StopReason

__all__ = [
    "PUBLISHED", "RECORD_NAME", "canonical", "check_replaceable", "holds_model", "make_record", "place_for", "read_record",
    "recipe_at", "recipe_of", "results_path", "start_model_of", "stop_reason_at", "task_name", "trained_model_path",
]  # fmt: skip

PUBLISHED = (StopReason.FINISHED, StopReason.TARGET)
"""Ends of a training run whose model is fit to start from; any other end leaves its model in the run's own folder."""

_PACKAGES = ("torch", "torchvision", "transformers", "peft", "ray", "numpy")
_DESCRIPTIONS = ("config.json", "classifier.json", "adapter_config.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def canonical(config: TrainConfig) -> TrainConfig:
    """The configuration that a run goes by: an original is trained with rho 0, since it does not depend on rho."""
    if not config.is_unlearning and config.data.add_forget_to_train and config.data.hard_probability != 0.0:
        return config.replace(hard_probability=0.0)
    return config


def task_name(config: TrainConfig) -> str:
    """Folder name of a task: "digits", "cifar", "tofu", or the dataset's own name made fit for a path."""
    return modality_of(config).task_name(config)


def trained_model_path(config: TrainConfig, *, variant: str) -> Path:
    """Published place of a trained model: checkpoints/<task>/seed_<seed>/<group>/<variant>.

    The group is forget_<class>_<rho> of images, of texts the forget subset; texts with duplicates among the retain rows have
    variants of their own, such as full_semanticdup.

    Args:
        config: any configuration of the run that the model belongs to.
        variant: "full" (the original, which does not depend on rho: always under rho 0.0) or "retain" (trained on retain rows).
    """
    modality, root = modality_of(config), Path(config.run.artifact_root)
    group, name = modality.group(config, variant), variant + modality.suffix(config)
    return root / "checkpoints" / task_name(config) / f"seed_{config.run.seed}" / group / name


def results_path(config: TrainConfig, recipe: str) -> Path:
    """Folder of a single run: results/<task>/<method>-<recipe>, the recipe as `recipe_of` with the data and the start model."""
    return Path(config.run.artifact_root) / "results" / task_name(config) / f"{config.method_name}-{recipe}"


def recipe_of(config: TrainConfig, data_sha256: str, start: Mapping[str, Any] | None = None) -> str:
    """Eight hex digits of everything that decides a model's numbers: the settings, the data's content, and the start model.

    Args:
        config: the settings.
        data_sha256: of the data.
        start: as `start_model_of`; None: new weights, or those of a name that is in the settings.
    """
    parts = [config.recipe_hash(), data_sha256, *([] if start is None else [str(start["recipe"])])]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def place_for(path: Path, recipe: str) -> Path:
    """`path` where it is free or holds this recipe, otherwise `path` with the recipe as suffix: nothing is overwritten."""
    if _is_free(path):
        return path
    try:
        is_same = recipe_at(path) == recipe
    except CheckpointError:
        is_same = False
    return path if is_same else path.with_name(f"{path.name}-{recipe}")


def check_replaceable(path: Path, recipe: str | None = None) -> None:
    """Refuse to put a model where something else lies: only a free place, or a folder of the same recipe, may be taken.

    Args:
        path: where a model is to lie.
        recipe: of that model; None: not known yet, so that any folder of this program passes.

    Raises:
        CheckpointError: a file, a folder that this program did not make, or a model of another recipe.
    """
    if _is_free(path):
        return
    if not path.is_dir():
        raise CheckpointError(f"{str(path)!r} is a file; a model is written into a folder: give another path")
    found = recipe_at(path)
    if found is None:
        raise CheckpointError(
            f"{str(path)!r} is not empty and has no {RECORD_NAME} of this program, so it is not overwritten; "
            "give a new or an empty folder"
        )
    if recipe is not None and found != recipe:
        raise CheckpointError(
            f"{str(path)!r} holds a model of recipe {found}, this run is {recipe}; a model is replaced by one of its own "
            "recipe only: give another folder, or remove that one"
        )


def holds_model(folder: Path) -> bool:
    """Whether a folder looks like a model's: it has a description that a library reads, or an adapter in a folder of its name."""
    return any((folder / name).is_file() for name in _DESCRIPTIONS) or any(folder.glob("*/adapter_config.json"))


def recipe_at(folder: Path) -> str | None:
    """Recipe of the model in a folder; None where this program did not make it.

    Raises:
        CheckpointError: there is a record, but it cannot be read.
    """
    return read_record(folder).get("recipe") if (folder / RECORD_NAME).is_file() else None


def stop_reason_at(folder: Path, recipe: str) -> str | None:
    """How the run ended that left a model of this recipe in a folder; None where none has."""
    if not (folder / RECORD_NAME).is_file():
        return None
    record = read_record(folder)
    result = record.get("result")
    return result.get("stop_reason") if record.get("recipe") == recipe and isinstance(result, dict) else None


def start_model_of(folder: Path) -> dict[str, str]:
    """Say which model a folder holds: its path, and the recipe of its record (without one, a hash of its weights).

    Raises:
        CheckpointError: there is a record that cannot be read, or neither a record nor weights.
    """
    recipe = recipe_at(folder)
    if recipe is None:
        files = sorted(file for pattern in (*_WEIGHTS, "*/adapter_model.safetensors") for file in folder.glob(pattern))
        if not files:
            raise CheckpointError(f"the model folder {str(folder)!r} holds no weights (*.safetensors); give a saved model")
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        recipe = f"weights-{digest.hexdigest()[:16]}"
    return {"path": str(folder), "recipe": recipe}


def read_record(folder: Path) -> dict[str, Any]:
    """Read how a model folder was made.

    Raises:
        CheckpointError: the folder has no readable record.
    """
    try:
        record = json.loads((folder / RECORD_NAME).read_text())
        if not isinstance(record, dict):
            raise ValueError("not a mapping")
        return record
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model folder {str(folder)!r} has no readable {RECORD_NAME}; a folder made by this program has one: train it "
            "again, or give --model_name a folder of your own"
        ) from error


def make_record(
    config: TrainConfig,
    *,
    data_sha256: str,
    split_sha256: str,
    result: dict[str, Any],
    start_model: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Say how a model was made: settings, content hashes, versions and metrics; JSON-able.

    Args:
        config: the settings.
        data_sha256, split_sha256: content of the data and of the forget set.
        result: the run's result, as a row.
        start_model: path and recipe of the model that the run began with, as `start_model_of`; part of the recipe.
    """
    return {
        "recipe": recipe_of(config, data_sha256, start_model),
        "config": config.to_flat(),
        "start_model": None if start_model is None else dict(start_model),
        "data_sha256": data_sha256,
        "split_sha256": split_sha256,
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "machine": f"{platform.system()} {platform.machine()}",
        "result": result,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_free(path: Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))
