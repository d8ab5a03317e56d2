"""The learning rate of each step and the inner optimizer of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from hamu.methods.combine import StepRules
from hamu.training.config import TrainConfig


def make_optimizer(config: TrainConfig, params: Iterable[Tensor]) -> torch.optim.Optimizer | None:
    """AdamW for training or with `use_optimizer`; None for plain SGD, which adds the update and has no state."""
    if config.optimizer_name == "sgd":
        return None
    return torch.optim.AdamW(params, lr=config.lr, weight_decay=config.training.weight_decay, foreach=True)


def lr_factor(schedule: str, step: int, total_steps: int) -> float:
    """Share of the learning rate at a step, in (0, 1]; the radius and the constraint follow it. No warm-up.

    constant: 1. linear: 1 - step / total. cosine: (1 + cos(pi step / total)) / 2.
    """
    if schedule == "linear":
        return 1 - step / total_steps
    if schedule == "cosine":
        return (1 + math.cos(math.pi * step / total_steps)) / 2
    return 1.0


def rules_at(config: TrainConfig, lr: float, product: float | None = None) -> StepRules:
    """Limits of the step at a learning rate; a schedule reaches the constraint and a fixed radius alike.

    product: S, of which the constraint may be a share (`TrainConfig.constraint_of`); None: not known yet.
    """
    scale = lr / config.lr
    return StepRules(
        constraint=config.constraint_of(product) * scale,
        radius=None if config.radius is None else config.radius * scale,
        split=config.split,
        full_grad=config.method.full_grad,
        on_infeasible=config.on_infeasible,
        normalize_split=not config.method.no_normalize_distributed_constraint,
    )
