"""What stays in a process from trial to trial: the images on the device, the models, the estimates of their memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hamu.data.sources import ImageData
from hamu.errors import CheckpointError
from hamu.methods.catalog import find_method
from hamu.tasks.vision import VisionTask, task_for
from hamu.training.config import TrainConfig
from hamu.training.memory import MemoryEstimate, estimate_memory
from launch.plan import PlannedTrial, data_key
from launch.shared import Original, Shared

_MAX_TASKS = 4


class WarmParts:
    """Gives a trial its rows and its models, from what the trials before it have left.

    Args:
        shared: what the sweep shares.
        fetch: turns an entry of `shared.data` and `shared.originals` into the object.
        device: where tensors live.
        size: processes of a trial.
    """

    def __init__(self, shared: Shared, fetch: Callable[[Any], Any], *, device: torch.device | str, size: int) -> None:
        self._shared, self._fetch, self._device, self._size = shared, fetch, device, size
        self._tasks: dict[tuple[Any, ...], VisionTask] = {}
        self._models: dict[str, nn.Module] = {}
        self._frozen: dict[str, nn.Module] = {}
        self._estimates: dict[tuple[Any, ...], MemoryEstimate] = {}

    def task(self, trial: PlannedTrial, config: TrainConfig) -> tuple[VisionTask, ImageData]:
        """A trial's task and the data it is drawn from."""
        data: ImageData = self._fetch(self._shared.data[data_key(config)])
        drawn = config.data
        key = (
            data_key(config), config.run.model_name, config.run.img_size, drawn.forget_class, drawn.hard_probability,
            config.run.seed, drawn.split_ratio, drawn.k_pct, trial.original,
        )  # fmt: skip
        if key not in self._tasks:
            while len(self._tasks) >= _MAX_TASKS:
                self._tasks.pop(next(iter(self._tasks)))
            self._tasks[key] = task_for(config, data, device=self._device, start=self.start_folder(trial))
        return self._tasks[key], data

    def start_folder(self, trial: PlannedTrial) -> Path:
        """The folder of the model that a trial starts from.

        Raises:
            CheckpointError: it is gone.
        """
        original: Original = self._fetch(self._shared.originals[trial.original])
        path = Path(original.path)
        if not path.is_dir():
            raise CheckpointError(
                f"no model folder {original.path!r}; trials need the original: resume the sweep to train it anew"
            )
        return path

    def model(self, trial: PlannedTrial, task: VisionTask) -> nn.Module:
        """The model to change, with the original's weights. There is one for all trials from one original."""
        return self._load(self._models, trial, task, is_trained=True)

    def frozen(self, trial: PlannedTrial, task: VisionTask) -> nn.Module:
        """The frozen original."""
        return self._load(self._frozen, trial, task, is_trained=False)

    def estimate(self, trial: PlannedTrial, task: VisionTask, config: TrainConfig, model: nn.Module) -> MemoryEstimate:
        """Bytes that a process of the trial should need at most; measured once for trials of a kind."""
        needs_original = find_method(config.method_name).needs_original
        batch_size, optimizer = config.training.per_device_train_batch_size, config.optimizer_name
        key = (trial.original, data_key(config), optimizer, batch_size, config.training.precision, needs_original)
        if key not in self._estimates:
            self._estimates[key] = estimate_memory(
                task,
                model,
                optimizer_name=optimizer,
                size=self._size,
                batch_size=batch_size,
                precision=config.training.precision,
                needs_original=needs_original,
            )
        return self._estimates[key]

    def _load(self, models: dict[str, nn.Module], trial: PlannedTrial, task: VisionTask, *, is_trained: bool) -> nn.Module:
        key = trial.original
        original: Original = self._fetch(self._shared.originals[key])
        if key not in models:
            models[key] = task.load_model(Path(original.path))
        model = models[key]
        # torch.tensor copies: the arrays are shared by all slots, and torch would write into them.
        model.load_state_dict({name: torch.tensor(array) for name, array in original.arrays.items()})
        for param in model.parameters():
            param.requires_grad_(is_trained)
            param.grad = None
        return model
