"""Where things lie under the artifact root, and the record that every model folder carries."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from pathlib import Path
from typing import Any

from hamu.errors import CheckpointError
from hamu.training.config import TrainConfig

RECORD_NAME = "record.json"
_TASKS = {"uoft-cs/cifar10": "cifar", "cifar10": "cifar", "uoft-cs/cifar100": "cifar100"}
_PACKAGES = ("torch", "torchvision", "transformers", "ray", "numpy")


def task_name(config: TrainConfig) -> str:
    """Folder name of a task: "digits", "cifar", or the dataset's own name made fit for a path."""
    name = config.data.dataset_name.rstrip("/")
    short = name.rsplit("/", 1)[-1]
    return _TASKS.get(name) or _TASKS.get(short) or re.sub(r"[^A-Za-z0-9_.-]+", "_", short).strip("._") or "data"


def trained_model_path(config: TrainConfig, *, variant: str) -> Path:
    """Published place of a trained model: checkpoints/<task>/seed_<seed>/forget_<class>_<rho>/<variant>.

    Args:
        config: any configuration of the run that the model belongs to.
        variant: "full" (the original, which does not depend on rho: always under rho 0.0) or "retain" (trained on retain rows).
    """
    rho = 0.0 if variant == "full" else float(config.data.hard_probability)
    group = f"forget_{config.data.forget_class}_{rho}"
    return Path(config.run.artifact_root) / "checkpoints" / task_name(config) / f"seed_{config.run.seed}" / group / variant


def results_path(config: TrainConfig) -> Path:
    """Folder of a single run: results/<task>/<method>-<recipe>."""
    return Path(config.run.artifact_root) / "results" / task_name(config) / f"{config.method_name}-{config.recipe_hash()}"


def recipe_of(config: TrainConfig, data_sha256: str) -> str:
    """Eight hex digits of everything that decides a trained model's numbers: the settings and the data's content."""
    return hashlib.sha256(f"{config.recipe_hash()} {data_sha256}".encode()).hexdigest()[:8]


def place_for(path: Path, recipe: str) -> Path:
    """`path` where it is free or holds this recipe, otherwise `path` with the recipe as suffix: nothing is overwritten."""
    record = path / RECORD_NAME
    if path.exists() and (not record.exists() or read_record(path).get("recipe") != recipe):
        return path.with_name(f"{path.name}-{recipe}")
    return path


def read_record(folder: Path) -> dict[str, Any]:
    """Read how a model folder was made.

    Raises:
        CheckpointError: the folder has no readable record.
    """
    try:
        return json.loads((folder / RECORD_NAME).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model folder {str(folder)!r} has no readable {RECORD_NAME}; a folder made by this program has one: train it "
            "again, or give --model_name a folder of your own"
        ) from error


def make_record(config: TrainConfig, *, data_sha256: str, split_sha256: str, result: dict[str, Any]) -> dict[str, Any]:
    """Say how a model was made: settings, content hashes, versions and metrics; JSON-able."""
    return {
        "recipe": recipe_of(config, data_sha256),
        "config": config.to_flat(),
        "data_sha256": data_sha256,
        "split_sha256": split_sha256,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
        "result": result,
    }
