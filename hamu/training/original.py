"""Models that a run starts from: trained once for every recipe, shared by all that need them, reused later."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from hamu.data.sources import ImageData, load_image_data
from hamu.tasks.vision import VisionTask, task_for
from hamu.training.artifacts import RECORD_NAME, make_record, place_for, recipe_of, trained_model_path
from hamu.training.config import TrainConfig
from hamu.training.loop import TrainingRun
from hamu.training.progress import watch

logger = logging.getLogger(__name__)


def load_data(config: TrainConfig) -> ImageData:
    """Load the dataset of a configuration, with the decoded-image cache under its artifact root."""
    return load_image_data(
        dataclasses.replace(config.data, dataset_cache_dir=config.dataset_cache_dir), img_size=config.run.img_size
    )


def choose_device(config: TrainConfig) -> torch.device:
    """The device asked for, otherwise a GPU if there is one."""
    return torch.device(config.run.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def provide_model(config: TrainConfig, data: ImageData, *, progress: bool = False) -> Path:
    """Give the folder of the model that a training configuration describes, training it if it is not there yet.

    Two processes that ask for the same model train it once: the second waits for the first.

    Args:
        config: `unlearning_method` none; with `add_forget_to_train` the original ("full"), else the retrained model ("retain").
        data: the rows.
        progress: draw a progress line on a terminal.

    Returns:
        checkpoints/<task>/seed_<seed>/forget_<class>_<rho>/{full,retain}, with the recipe as suffix where another recipe's model
        lies there already.
    """
    assert not config.is_unlearning, "only training configurations describe a model to start from"
    variant = "full" if config.data.add_forget_to_train else "retain"
    recipe = recipe_of(config, data.sha256)
    published = trained_model_path(config, variant=variant)
    with _locked(published):
        path = place_for(published, recipe)
        if not path.exists():
            task = task_for(config, data, device=choose_device(config))
            _train(config, task, data, path, progress=progress)
    return path


def _train(config: TrainConfig, task: VisionTask, data: ImageData, path: Path, *, progress: bool) -> None:
    model = task.new_model(config.run.seed)
    run = TrainingRun(config, task, model)
    for _ in watch(run, title=f"training {path.name}", enabled=progress):
        pass
    assert run.result is not None
    record = make_record(config, data_sha256=data.sha256, split_sha256=task.forget_set.sha256, result=run.result.row())
    save_model(task, model, path, record)
    logger.info("trained %s: test accuracy %.4f", path, run.result.after["test_accuracy"])


def save_model(task: VisionTask, model: nn.Module, path: Path, record: dict[str, object]) -> None:
    """Write a model folder that is complete when it is there; one at the same place is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    task.save_model(model, temporary, record)
    if not (temporary / RECORD_NAME).exists():
        (temporary / RECORD_NAME).write_text(json.dumps(record, indent=1))
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
