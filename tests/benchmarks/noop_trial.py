"""Trials that do nothing but what every trial does around its training: lock, attempt, row."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hamu.training.records import METRIC_COLUMNS
from launch.attempts import Attempts
from launch.plan import Plan, make_plan
from launch.results import SweepFolder, trial_lock, write_json
from launch.shared import Shared, identity
from launch.trainable import UnlearningTrial
from launch.trial_row import plain_metrics
from tune_spaces.search import SearchSettings
from tune_spaces.space import Space


class NoopSlot:
    """Says a trial's numbers and writes its row, as `launch.slot.Slot` would after training."""

    def __init__(self, shared: Shared) -> None:
        self._shared, self._folder = shared, SweepFolder(Path(shared.folder))
        self._trials = {trial.trial_id: trial for trial in shared.plan.trials}

    def begin(
        self,
        trial_id: str,
        overrides: Mapping[str, Any] | None = None,
        load_from: str | None = None,
        started_at: float | None = None,
    ) -> dict[str, Any]:
        """As a slot's: take the trial."""
        self._trial, self._started_at = self._trials[trial_id], started_at
        return {"ended": False, "step": 0, "total_steps": 1}

    def advance(self, *, saves: bool = False) -> dict[str, Any]:
        """As a slot's: end it. saves: has nothing to save."""
        folder = self._folder.trial(self._trial.trial_id)
        with trial_lock(folder):
            attempts = Attempts(folder, self._shared.run_id)
            attempts.open()
            row = {
                **identity(self._shared.plan, self._trial), **dict.fromkeys(METRIC_COLUMNS, 0.5), "status": "finished",
                "error": None, "stop_reason": "completed", "steps": 1, "started_at": self._started_at, "ended_at": time.time(),
                "setup_s": 0.0, "train_s": 0.0, "n_classes": 10, "attempts": 1, "peak_bytes_per_rank": [1], "slot": os.getpid(),
                "model_path": str(folder / "model"), "config": json.dumps(dict(self._trial.config)),
            }  # fmt: skip
            write_json(folder / "row.json", row)
            attempts.close()
        return {**plain_metrics(row), "step": 1, "ended": True}

    def leave(self) -> dict[str, Any]:
        """As a slot's."""
        return {"ended": True}


class NoopTrial(UnlearningTrial):
    """The real trial of Tune around a slot that does nothing."""

    make_slot = staticmethod(NoopSlot)  # type: ignore[assignment]


def noop_plan(root: Path, n_trials: int, search: str) -> Plan:
    """A plan of that many trials on digits."""
    rates = tuple(0.001 * (1 + i) / n_trials for i in range(n_trials))
    space = Space(
        name="digits/noop",
        summary="trials that do nothing",
        base={"dataset_name": "digits", "unlearning_method": "hamu-q", "constraint_ratio": 0.1},
        grids=({"learning_rate": rates},),
    )
    return make_plan(
        space,
        name="noop",
        overrides={},
        root=root,
        search=SearchSettings(name=search, trials=None if search == "grid" else n_trials),
    )
