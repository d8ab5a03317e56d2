"""A trial slot as Ray Tune sees it."""

from __future__ import annotations

import os
import time
from typing import Any

import ray
from ray import tune

from hamu.training.stop import StopReason
from launch.shared import Shared


class UnlearningTrial(tune.Trainable):
    """One trial after another in one process (`reuse_actors`): Tune says which, the slot runs it."""

    def setup(self, config: dict[str, Any], shared: Shared | None = None) -> None:
        """Start the process's slot with its first trial; `shared` comes through `tune.with_parameters`."""
        started = time.time()
        assert shared is not None, "a trial needs what its sweep shares"
        from launch.slot import Slot  # torch comes in here, and counts as the first trial's set-up

        self._has_told_end = False
        self._slot = Slot(shared, ray.get)
        self._slot.begin(config["trial_id"], started_at=started)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        if self._slot.is_broken:
            os._exit(1)  # a device error poisons the process: Tune starts the trial in a new one
        self._has_told_end = False
        self._slot.begin(new_config["trial_id"])
        return True

    def step(self) -> dict[str, Any]:
        """Train on to the next report.

        A trial that ended by HAMU's stopping criterion is ended by `StoppingCriterionStopper`, any other by `done`;
        asked once more, it is done too.
        """
        metrics = self._slot.advance()
        if metrics.pop("ended"):
            metrics["done"] = self._has_told_end or metrics["stop_reason"] != StopReason.CRITERION.value
            self._has_told_end = True
        return metrics

    def cleanup(self) -> None:
        """Leave the trial at hand."""
        self._slot.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a trial keeps its own checkpoint in its folder."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing: a trial goes on from the checkpoint in its folder."""
