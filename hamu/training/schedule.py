"""The inner optimizer and the learning-rate schedule of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from hamu.training.config import TrainConfig


def make_optimizer(config: TrainConfig, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Plain SGD, whose step is the update exactly, or AdamW (training, or `use_optimizer`)."""
    if config.optimizer_name == "adamw":
        return torch.optim.AdamW(params, lr=config.lr, weight_decay=config.training.weight_decay, foreach=True)
    return torch.optim.SGD(params, lr=config.lr, foreach=True)


def make_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """Learning rate of each step; the radius and the constraint follow it. No warm-up."""
    return get_scheduler(
        config.training.lr_scheduler_type, optimizer, num_warmup_steps=0, num_training_steps=total_steps
    )
