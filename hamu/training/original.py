"""Models that a run starts from: trained once for every recipe, shared by all that need them, reused later."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hamu.errors import CheckpointError, ConfigError, CorruptError, LeaseError
from hamu.models.record import json_text
from hamu.storage import mount
from hamu.storage.files import patiently, set_aside
from hamu.storage.lease import Lease
from hamu.storage.weights import check_weights
from hamu.tasks.base import Data, Task
from hamu.tasks.catalog import modality_of
from hamu.training.artifacts import (
    PUBLISHED,
    RECORD_NAME,
    canonical,
    check_replaceable,
    holds_model,
    make_record,
    place_for,
    recipe_of,
    start_model_of,
    stop_reason_at,
    trained_model_path,
)
from hamu.training.config import TrainConfig
from hamu.training.inputs import find_start
from hamu.training.loop import TrainingRun
from hamu.training.outcome import RunResult
from hamu.training.progress import watch

logger = logging.getLogger(__name__)


def load_data(config: TrainConfig) -> Data:
    """Load the dataset of a configuration, with its cache under the artifact root."""
    return modality_of(config).load_data(config)


def task_for(config: TrainConfig, data: Data, *, device: torch.device | str, start: Path | None = None) -> Task:
    """Make the task of a configuration on loaded rows.

    Args:
        config: the settings.
        data: the rows.
        device: of batches and models.
        start: folder of the model that will be loaded, which may say how its inputs are made; None: a new one by `model_name`.

    Raises:
        HamuError: the rows, the model or the settings do not fit each other.
    """
    return modality_of(config).make_task(config, data, device=device, start=start)


def choose_device(config: TrainConfig) -> torch.device:
    """The device asked for, otherwise a GPU if there is one.

    Raises:
        ConfigError: a GPU is asked for that is not there.
    """
    name = config.run.device
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(name or ("cuda" if n_gpus else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        raise ConfigError(f"device {name!r} is not there: this machine shows {n_gpus} GPUs; give --device cpu, or leave it out")
    return device


def published_path(config: TrainConfig) -> Path:
    """Published place of the model that a training configuration describes: "full" is the original, "retain" the retrained."""
    return trained_model_path(config, variant="full" if config.data.add_forget_to_train else "retain")


def provide_model(config: TrainConfig, data: Data, *, progress: bool = False) -> Path:
    """Give the folder of the model that a training configuration describes, training it if it is not there yet.

    Two processes that ask for the same model train it once: the second waits for the first.

    Args:
        config: `unlearning_method` none; with `add_forget_to_train` the original ("full"), else the retrained model ("retain").
        data: the rows.
        progress: draw a progress line on a terminal.

    Returns:
        checkpoints/<task>/seed_<seed>/<group>/{full,retain}<suffix> (`trained_model_path`), with the recipe behind it where
        another one's model lies there. A model there without a record, such as a published checkpoint, is taken as it is.

    Raises:
        CheckpointError: the training ended in a way that no run should start from, such as a gradient that is not finite.
    """
    assert not config.is_unlearning, "only training configurations describe a model to start from"
    config = canonical(config)
    folder = find_start(config)
    start = None if folder is None else start_model_of(folder)
    recipe = recipe_of(config, data.sha256, start)
    published = published_path(config)
    with locked(published) as lease:
        if adopts(published):
            return published
        path = place_for(published, recipe)
        if stop_reason_at(path, recipe) in PUBLISHED and _is_whole(path):
            return path
        task = task_for(config, data, device=choose_device(config))
        model = task.new_model(config.run.seed)
        run = TrainingRun(config, task, model)
        for _ in watch(run, title=f"training {path.name}", enabled=progress):
            pass
        assert run.result is not None
        check_fit_to_start_from(config, run.result, path)
        split = task.forget_set.sha256
        record = make_record(config, data_sha256=data.sha256, split_sha256=split, result=run.result.row(), start_model=start)
        lease.check()
        save_model(task, model, path, record)
        split = "test" if "test_accuracy" in run.result.after else "retain"
        logger.info("trained %s: %s accuracy %.4f", path, split, run.result.after.get(f"{split}_accuracy", float("nan")))
    return path


def _is_whole(folder: Path) -> bool:
    """Whether a model's weights are as long as they should be; those that are not are set aside, to be made again."""
    try:
        for path in sorted(folder.rglob("*.safetensors")):
            check_weights(path)
    except CorruptError as error:
        aside = set_aside(folder)
        logger.warning("%s is broken (%s), set aside as %s; it is made again", error.path, error.why, aside.name)
        return False
    return True


def adopts(path: Path) -> bool:
    """Whether a published place holds a model that this program did not make; it is taken as it is, and that is said."""
    if (path / RECORD_NAME).exists() or not holds_model(path):
        return False
    logger.warning("%s has no %s: taken as the published checkpoint that it looks like, with settings unknown", path, RECORD_NAME)
    return True


def check_fit_to_start_from(config: TrainConfig, result: RunResult, path: Path) -> None:
    """Refuse a training result that nothing should start from, and warn of one that missed its target.

    Raises:
        CheckpointError: the training was cancelled or diverged.
    """
    if result.stop_reason not in PUBLISHED:
        raise CheckpointError(
            f"training {str(path)!r} ended at step {result.steps} ({result.stop_reason}), so there is no model to start from; "
            f"train it with a learning_rate below {config.lr:g}, or with other settings"
        )
    warn_of_missed_target(config, result)


def warn_of_missed_target(config: TrainConfig, result: RunResult) -> None:
    """Say in one line that a run ended below the `target_test_accuracy` it was to reach."""
    target, reached = config.training.target_test_accuracy, result.after.get("test_accuracy", 0.0)
    if target is not None and not reached >= target:
        logger.warning(
            "target_test_accuracy %g was not reached: test accuracy %.4f after %d steps; give more num_train_epochs",
            target,
            reached,
            result.steps,
        )


def publish_model(config: TrainConfig, task: Task, model: nn.Module, record: Mapping[str, Any]) -> Path:
    """Save a trained model at its published place, under the same lock as `provide_model`; returns the place.

    The place is chosen when it is written, so that a model that came there meanwhile is not overwritten.
    """
    published = published_path(config)
    with locked(published):
        path = place_for(published, str(record["recipe"]))
        save_model(task, model, path, record)
    return path


def save_model(
    task: Task, model: nn.Module, path: Path, record: Mapping[str, Any], *, wait: Callable[[str], None] | None = None
) -> None:
    """Write a model folder that is complete when it is there; a folder of the same recipe is replaced, nothing else.

    wait: as in `files.patiently`, for a storage that is full.

    Raises:
        CheckpointError: something else lies there.
    """
    mount.fetch(path)
    patiently(lambda: _save_model(task, model, path, record), wait=wait, folder=path.parent)
    mount.publish(path)


def _save_model(task: Task, model: nn.Module, path: Path, record: Mapping[str, Any]) -> None:
    check_replaceable(path, str(record["recipe"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own name in the same file system: the renames below move nothing, and nobody else writes in there.
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    new, old = scratch / "new", scratch / "old"
    try:
        task.save_model(model, new, record)
        if not (new / RECORD_NAME).exists():
            (new / RECORD_NAME).write_text(json_text(record, indent=1) + "\n")
        if path.exists():
            check_replaceable(path, str(record["recipe"]))
            os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
    finally:
        if not old.exists() or path.exists():
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[Lease]:
    """Hold the lease of a published place, which every writer of models there takes, and have what others wrote there."""
    name = f".{path.name}.lease"
    lease = Lease(path.parent, name)
    try:
        lease.__enter__()
    except LeaseError:
        logger.info("waiting for another process that makes a model at %s", mount.shown(path))
        lease = Lease(path.parent, name, patience_s=math.inf, say=logger.info)
        lease.__enter__()
    try:
        mount.fetch(path.parent, only=lambda name: name.startswith(path.name))
        yield lease
    finally:
        lease.release()
