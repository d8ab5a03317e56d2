"""What stays in a process from trial to trial: the rows on the device, the models, the estimates of their memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hamu.errors import CheckpointError
from hamu.storage import mount
from hamu.tasks.base import Data, Task
from hamu.training.checkpoints import changing_state, load_changing_state
from hamu.training.config import TrainConfig
from hamu.training.loop import TrainingRun
from hamu.training.memory import MemoryEstimate, estimate_memory
from hamu.training.original import task_for
from launch.plan import PlannedTrial, data_key
from launch.shared import Original, Shared

_MAX_TASKS, _MAX_MODELS = 4, 2
_OF_MODEL = (
    "add_lora", "lora_name", "lora_r", "lora_alpha", "lora_dropout", "lora_targets", "bf16", "gradient_checkpointing",
)  # fmt: skip


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
        self._tasks: dict[tuple[Any, ...], Task] = {}
        self._models: dict[tuple[Any, ...], nn.Module] = {}
        self._own_starts: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        self._estimates: dict[tuple[Any, ...], MemoryEstimate] = {}

    def task(self, trial: PlannedTrial, config: TrainConfig) -> tuple[Task, Data]:
        """A trial's task and the data it is drawn from."""
        data: Data = self._fetch(self._shared.data[data_key(config)])
        logging, run = config.logging, config.run
        key = (
            data_key(config), config.data, run.model_name, run.img_size, run.seed, trial.original, *_model_settings(config),
            logging.eval_tofu,
            logging.eval_generation_rows, logging.retain_reference,
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
        mount.fetch(path)
        if not path.is_dir():
            raise CheckpointError(
                f"no model folder {original.path!r}; trials need the original: resume the sweep to train it anew"
            )
        return path

    def model(self, trial: PlannedTrial, task: Task) -> nn.Module:
        """The model to change, with the original's weights. There is one for all trials from one original, and of one kind."""
        original: Original = self._fetch(self._shared.originals[trial.original])
        key = (trial.original, *_model_settings(self._shared.plan.configs[trial.trial_id]))
        if key not in self._models:
            while len(self._models) >= _MAX_MODELS:
                gone = next(iter(self._models))
                self._models.pop(gone)
                self._own_starts.pop(gone, None)
            self._models[key] = model = task.load_model(Path(original.path))
            if _shapes(changing_state(model)) != _shapes(original.arrays):  # such as a new adapter on a whole original
                self._own_starts[key] = {name: value.clone() for name, value in changing_state(model).items()}
        model = self._models[key]
        # torch.tensor copies: the arrays are shared by all slots, and torch would write into them.
        start = self._own_starts.get(key) or {name: torch.tensor(array) for name, array in original.arrays.items()}
        load_changing_state(model, start)
        for param in model.parameters():
            param.grad = None
        return model

    def estimate(self, trial: PlannedTrial, task: Task, run: TrainingRun) -> MemoryEstimate:
        """Bytes that a process of the trial should need at most; measured once for trials of a kind."""
        config = run.config
        batch_size, optimizer = config.training.per_device_train_batch_size, config.optimizer_name
        key = (
            trial.original,
            config.data,
            optimizer,
            batch_size,
            config.training.precision,
            *_model_settings(config),
            *_passes_of(run),
        )
        if key not in self._estimates:
            self._estimates[key] = estimate_memory(
                task, run.engine, optimizer_name=optimizer, size=self._size, batch_size=batch_size
            )
        return self._estimates[key]


def _model_settings(config: TrainConfig) -> tuple[Any, ...]:
    """The settings that decide how a folder is loaded as a model."""
    return tuple(getattr(config.training, name) for name in _OF_MODEL)


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _passes_of(run: TrainingRun) -> tuple[bool, ...]:
    """What decides how much a method's passes hold."""
    method = run.method
    return method.retain is not None, method.forget is not None, method.needs_original
