"""Which rows each step sees: a pure function of the seed, the sizes and the step, so that a resumed run sees the same ones."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hamu.methods.base import Method
from hamu.training.steps import steps_per_epoch


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The rows of every step.

    n_retain, n_forget: rows of each set. rows_per_step: per-device batch size times gradient accumulation times pairs. seed:
    None keeps the sets' order; otherwise both are shuffled once, the retain set first, by `random.Random(seed)` (the order of
    published runs).

    An epoch is ceil(n_retain / rows_per_step) steps, whatever the method. A short last retain batch is used as it is; the forget
    set cycles by rows, so its batches are always full.
    """

    n_retain: int
    n_forget: int
    rows_per_step: int
    seed: int | None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return steps_per_epoch(self.n_retain, self.rows_per_step)

    def retain(self, step: int) -> Tensor:
        """Positions in the retain set of a paired step, shape (<= rows_per_step,)."""
        start = (step % self.steps_per_epoch) * self.rows_per_step
        return self._orders[0][start : start + self.rows_per_step]

    def forget(self, step: int) -> Tensor:
        """Positions in the forget set of a paired step, shape (rows_per_step,)."""
        return _cycle(self._orders[1], step, self.rows_per_step)

    def retain_alone(self, step: int) -> Tensor:
        """Positions for a method that reads retain rows only: as many rows a step as a pair has, shape (2 rows_per_step,)."""
        return _cycle(self._orders[0], step, 2 * self.rows_per_step)

    def forget_alone(self, step: int) -> Tensor:
        """Positions for a method that reads forget rows only, shape (2 rows_per_step,)."""
        return _cycle(self._orders[1], step, 2 * self.rows_per_step)

    @cached_property
    def _orders(self) -> tuple[Tensor, Tensor]:
        orders = [list(range(self.n_retain)), list(range(self.n_forget))]
        if self.seed is not None:
            shuffler = random.Random(self.seed)
            for order in orders:
                shuffler.shuffle(order)
        return torch.tensor(orders[0], dtype=torch.int64), torch.tensor(orders[1], dtype=torch.int64)


def rows_of_roles(plan: BatchPlan, step: int, method: Method, *, is_training: bool) -> tuple[Tensor | None, Tensor | None]:
    """Give the rows of a step, retain and forget; None for a role that the method has not.

    An unlearning method with one role takes as many rows as a pair has, so that methods are compared at equal compute; plain
    training takes those of one role.
    """
    if method.is_paired:
        return plan.retain(step), plan.forget(step)
    if is_training:
        return plan.retain(step), None
    if method.forget is None:
        return plan.retain_alone(step), None
    return None, plan.forget_alone(step)


def _cycle(order: Tensor, step: int, count: int) -> Tensor:
    return order[torch.arange(step * count, (step + 1) * count) % len(order)]
