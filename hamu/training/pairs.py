"""The gradient pair of a step behind one interface: both gradients in one process here, spread over processes in groups.py.

A pair gives each role that this process computes a flat buffer for the backward pass (every `param.grad` is a view of it); from
`exchange` on it holds `table`, the two gradients of the whole step, or one shard of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hamu.methods.gram import BlockLayout, Grams, grams_of_sums

RETAIN, FORGET = 0, 1
"""Roles, as rows of a pair."""


@dataclass(frozen=True)
class Wish:
    """What a process asks for at a step; it travels with the gradients, so that all act on the same one at the same step.

    stop: end before this step is applied, for a reason by number; 0: go on. Of several the largest counts. pause: let the caller
    look up after this step; that of the first process counts.
    """

    stop: int = 0
    pause: bool = False


NO_WISH = Wish()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one read of the device tells: the Grams of the unclipped pair, the objectives' means over the step's labels (nats),
    and what the processes agreed on."""

    grams: Grams
    retain_loss: float
    forget_loss: float
    wish: Wish


class GradientPair(Protocol):
    """Gradients of both roles, from the backward passes to the combined step."""

    layout: BlockLayout
    table: Tensor
    """After `exchange`: row 0 the retain gradient, row 1 the forget gradient, both unclipped, of the rows held here."""

    def views(self, role: int) -> list[Tensor] | None:
        """Give the buffers that a role's backward passes accumulate into, one a parameter; None: the role is not done here."""

    def share(self, role: int) -> tuple[int | None, int]:
        """Tell which of how many equal shares of a role's rows are this process's; None: none of them."""

    def zero_(self) -> None:
        """Forget the last step."""

    def exchange(self, losses: Tensor, n_labels: Sequence[int], wish: Wish) -> None:
        """Make `table` of the buffers.

        Args:
            losses: mean objective of each role over this process's labels, shape (2,), float64, on the device.
            n_labels: this process's labels of each role.
            wish: of this process.
        """

    def read(self, *, precise: bool) -> Reading:
        """Read Grams (in float64 throughout if `precise`), losses and wishes of the step: once, for all together."""

    def combine(self, weights: np.ndarray) -> list[Tensor]:
        """Give w_r g_r + w_f g_f, one tensor a parameter; overwrites the buffers. weights: shape (n_blocks, 2)."""

    def whole(self, rows: Tensor) -> Tensor:
        """Put together a flat buffer, shape (n_elements,), of which every process holds the rows of its `table`."""

    def own(self, buffer: Tensor) -> Tensor:
        """Give the part of a flat buffer that `whole` would take from here."""


class LocalPair:
    """Both roles in this process."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.layout = BlockLayout(params)
        self.table = self.layout.zeros(params[0].dtype)
        self._views = [self.layout.views(buffer) for buffer in self.table]
        self._losses = torch.zeros(2, dtype=torch.float64, device=self.layout.device)
        self._wish = Wish()

    def views(self, role: int) -> list[Tensor]:
        """As in `GradientPair`: both roles are done here."""
        return self._views[role]

    def share(self, role: int) -> tuple[int, int]:
        """As in `GradientPair`: all rows are taken here."""
        return 0, 1

    def zero_(self) -> None:
        """As in `GradientPair`."""
        self.table.zero_()

    def exchange(self, losses: Tensor, n_labels: Sequence[int], wish: Wish) -> None:
        """As in `GradientPair`: the buffers are the table."""
        self._losses, self._wish = losses, wish

    def read(self, *, precise: bool) -> Reading:
        """As in `GradientPair`."""
        sums = self.layout.gram_sums(self.table, precise=precise)
        host = torch.cat([sums.flatten(), self._losses]).cpu().numpy()
        return Reading(
            grams=grams_of_sums(host[:-2].reshape(-1, 2, 2)),
            retain_loss=float(host[-2]),
            forget_loss=float(host[-1]),
            wish=self._wish,
        )

    def combine(self, weights: np.ndarray) -> list[Tensor]:
        """As in `GradientPair`."""
        self.layout.combine_(self.table, weights)
        return self._views[RETAIN]

    def whole(self, rows: Tensor) -> Tensor:
        """As in `GradientPair`: all rows are here."""
        return rows

    def own(self, buffer: Tensor) -> Tensor:
        """As in `GradientPair`: all rows are here."""
        return buffer
