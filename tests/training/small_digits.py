"""A model of every kind of block for the embedded digits, milliseconds a step, and unlearning with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hamu.training.config import TrainConfig
from hamu.training.loop import TrainingRun
from hamu.training.outcome import RunResult


def small_model(seed: int = 0) -> nn.Module:
    """A convolution, BatchNorm and a linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)
        )


def copy_of(model: nn.Module) -> nn.Module:
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    return twin


def unlearning(**settings: Any) -> TrainConfig:
    given = {"method": "hamu-q", "lr": 0.01, "constraint_ratio": 0.02, "epochs": 1, "logging_steps": 1, **settings}
    return TrainConfig.from_flat(given)


def ended(run: TrainingRun) -> RunResult:
    for _ in run:
        pass
    assert run.result is not None
    return run.result
