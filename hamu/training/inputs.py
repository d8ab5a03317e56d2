"""Checks of what a configuration points to (model folder, local dataset, class), made before torch is imported.

The loaders check again, and more; this is what can be known without the images and without the network.
"""

from __future__ import annotations

import os
from pathlib import Path

from hamu.errors import CheckpointError, DataError
from hamu.training.config import TrainConfig

# Classes of the datasets known by name, so that a class that does not exist is refused before anything is loaded.
KNOWN_CLASSES = {"digits": 10, "cifar10": 10, "uoft-cs/cifar10": 10, "cifar100": 100, "uoft-cs/cifar100": 100}


def is_local_path(name: str) -> bool:
    """Whether a model or dataset name means a folder: absolute, begins with . or ~, has two separators, or exists."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or Path(name).expanduser().exists()


def check_inputs(config: TrainConfig) -> None:
    """Refuse a model folder, a local dataset, one of its columns or splits, or a class that does not exist.

    Raises:
        CheckpointError: `model_name` is a path without a model in it.
        DataError: the local dataset is missing or lacks a column or split, or `forget_class` is not one of its classes.
    """
    name = config.run.model_name
    if is_local_path(name):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise CheckpointError(
                f"model_name '{name}' is not a folder; train it first (--unlearning_method none "
                f"--add_forget_to_train --final_model_output_dir '{name}'), or give resnet20 or a hub name"
            )
        if not any((folder / file).is_file() for file in ("config.json", "record.json")):
            raise CheckpointError(f"model_name '{name}' has no config.json or record.json; give a saved model")
    dataset = config.data.dataset_name
    if dataset not in KNOWN_CLASSES and is_local_path(dataset):
        _check_folder(config)
    n_classes = KNOWN_CLASSES.get(dataset)
    if n_classes is not None and config.data.forget_class >= n_classes:
        raise DataError(
            f"forget_class {config.data.forget_class} does not exist in {dataset}; its classes are 0 to {n_classes - 1}"
        )


def _check_folder(config: TrainConfig) -> None:
    """Open a local dataset, and draw the forget set from its labels; no image is decoded."""
    data = config.data
    if not Path(data.dataset_name).expanduser().is_dir():
        raise DataError(f"dataset_name '{data.dataset_name}' is not a folder; give one, a hub name, or digits")
    from hamu.data.sources import read_train_labels
    from hamu.data.splits import draw_forget_set

    draw_forget_set(
        read_train_labels(data),
        forget_class=data.forget_class,
        rho=data.hard_probability,
        seed=config.run.seed,
        split_ratio=data.split_ratio,
    )
