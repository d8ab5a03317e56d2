"""A plan of short trials on digits, in a folder, and what is needed to run it with or without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hamu.data.sources import ImageData
from hamu.tasks.vision import task_for
from hamu.training.config import TrainConfig
from hamu.training.loop import TrainingRun
from launch.plan import Plan, data_key, make_plan, read_overrides
from launch.results import SweepFolder
from launch.shared import Original, Shared
from launch.slot import Slot
from tune_spaces.space import Space

EPOCHS = 0.5  # 6 steps of 128 rows
SPACE = Space(
    name="digits/small",
    summary="one short trial of each kind",
    base={"dataset_name": "digits", "num_train_epochs": EPOCHS, "learning_rate": 0.01, "eval_strategy": "no"},
    grids=(
        {"unlearning_method": ("hamu-q",), "constraint_ratio": (0.1,)},
        {"unlearning_method": ("hamu-u",), "constraint_ratio": (0.99,), "stop_on_stopping_criterion": (True,)},
        {"unlearning_method": ("ft", "kl")},
        {"unlearning_method": ("ft",), "hard_probability": (0.5,)},
    ),
)
METRICS = tuple(f"{split}_{metric}" for split in ("retain", "forget", "test") for metric in ("loss", "accuracy", "entropy"))


class SmallSweep:
    """A plan in a folder.

    Args:
        root: artifact root of its own.
        data, original: what the trials share.
        assignments: as of `--set`.
    """

    def __init__(self, root: Path, data: ImageData, original: Original, *assignments: str, space: Space = SPACE) -> None:
        self.data, self.original = data, original
        self.plan: Plan = make_plan(space, name="small", overrides=read_overrides(assignments), root=root)
        self.folder = SweepFolder(root / "small")
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.folder.start(self.plan)
        self.ids = [trial.trial_id for trial in self.plan.trials]

    @property
    def shared(self) -> Shared:
        return self.shared_by(lambda item: item)

    def shared_by(self, put: Callable[[Any], Any], **more: Any) -> Shared:
        """What slots are given, with `put` applied to the data and the original."""
        keys = {data_key(config) for config in self.plan.configs.values()}
        return Shared(
            plan=self.plan,
            folder=str(self.folder.path),
            data=dict.fromkeys(keys, put(self.data)),
            originals=dict.fromkeys(self.plan.originals, put(self.original)),
            run_id=more.pop("run_id", "first"),
            **more,
        )

    def slot(self, **more: Any) -> Slot:
        return Slot(self.shared_by(lambda item: item, **more), lambda item: item)

    def row(self, trial_id: str) -> dict[str, Any]:
        return json.loads((self.folder.trial(trial_id) / "row.json").read_text())

    def metrics(self, trial_id: str) -> dict[str, float]:
        """The numbers of the trial's end, which two equal trials share to the bit."""
        return {name: self.row(trial_id)[name] for name in (*METRICS, "steps")}


def run_to_end(slot: Slot, trial_id: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    slot.begin(trial_id, overrides)
    return advance_to_end(slot)


def advance_to_end(slot: Slot) -> dict[str, Any]:
    for _ in range(1000):
        metrics = slot.advance(budget_s=0.0)
        if metrics["ended"]:
            return metrics
        assert "stop_reason" not in metrics
    raise AssertionError("the trial does not end")


def small_original(data: ImageData, path: Path) -> Original:
    """A model that knows a little: an epoch of training, saved as a folder."""
    torch.set_num_threads(1)
    config = TrainConfig.from_flat({"add_forget_to_train": True, "num_train_epochs": 1})
    task = task_for(config, data)
    run = TrainingRun(config, task, task.new_model(42))
    list(run)
    task.save_model(run.model, path, {})
    arrays = {key: value.numpy().copy() for key, value in task.load_model(path).state_dict().items()}
    for array in arrays.values():
        array.setflags(write=False)  # as they come from the object store
    return Original(path=str(path), arrays=arrays)
