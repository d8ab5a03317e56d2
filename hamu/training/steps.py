"""How many steps a run takes: of its rows, its batches and its epochs. Torch-free, for plans too."""

from __future__ import annotations


def steps_per_epoch(n_retain: int, rows_per_step: int) -> int:
    """Optimizer steps in an epoch, ceil(n_retain / rows_per_step), whatever the method."""
    return -(-n_retain // rows_per_step)


def total_steps(n_epochs: float, per_epoch: int) -> int:
    """Steps of a run of so many epochs, a fraction allowed: rounded, at least 1."""
    return max(1, round(n_epochs * per_epoch))
