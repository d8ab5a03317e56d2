"""What the driver of a sweep does when Tune tells it of its trials: the board, the rows that no slot could write."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from hamu.training.records import METRIC_COLUMNS
from hamu.training.stop import StopReason
from launch.live import Board
from launch.plan import Plan
from launch.results import SweepFolder, has_ended, write_json
from launch.shared import failed_row, identity
from launch.signals import Signals
from launch.trainable import overrides_of, state_of

MAX_FAILURES = 4
"""How often Tune starts a trial again whose slot has died. A trial that takes its own process down ends itself before that."""

_SEEN_WITHIN_S = 10.0


class Follow(tune.Callback):
    """Tells the board and the results folder what happens to the trials.

    A trial that a scheduler or a stopper ends gets a row here that says so, "pruned"; its slot, which looks for that row when it
    leaves the trial, puts the whole row and the model in its place. `to_complete` lists those that no slot was left for.
    """

    def __init__(self, plan: Plan, folder: SweepFolder, board: Board, signals: Signals) -> None:
        self._plan, self._folder, self._board, self._signals = plan, folder, board, signals
        self._trials = {trial.trial_id: trial for trial in plan.trials}
        self._started: dict[str, float] = {}
        self._told: set[str] = set()
        self._stopped: dict[str, dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks, for a way to resume that is not ours

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune looks for news, several times a second."""
        self._signals.check()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A slot has taken the trial."""
        self._started.setdefault(str(trial), time.time())

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """The trial has trained on."""
        if str(trial) not in self._told:
            self._board.update(str(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial has ended and written its row, or is stopped here."""
        trial_id, last = str(trial), trial.last_result or {}
        path = self._row_path(trial_id)
        if "status" in last:  # the slot has written the row before it said so; a network file system may be late
            deadline = time.monotonic() + _SEEN_WITHIN_S
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            self._end(trial_id, "its process said nothing of how it ended")
            return
        if not path.exists():
            saved = trial.checkpoint if trial.status in (Trial.PAUSED, Trial.PENDING) else None
            self._stopped[trial_id] = {"state": state_of(saved.path) if saved else "", **overrides_of(trial.config)}
            self._write(trial_id, self._pruned_row(trial_id, last))
        self._end(trial_id, "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's process has died once too often."""
        times = f"its process died {MAX_FAILURES + 1} times"
        self._end(str(trial), f"{times}: {_last_words(trial) or 'killed, or out of memory'}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's process has died, and Tune starts another."""
        self._board.say(f"the process of {trial} died; the trial goes on from its checkpoint")

    def to_complete(self) -> dict[str, dict[str, Any]]:
        """Trials that were stopped while no slot had them, or whose slot died over it, but for those without any state.

        Each with `state` (a folder, or "" for the trial's own checkpoint) and the settings that a scheduler had changed.
        """
        rows = self._folder.rows()
        left = {trial_id: each for trial_id, each in self._stopped.items() if not has_ended(rows[trial_id])}
        return {
            trial_id: each
            for trial_id, each in left.items()
            if each["state"] or (self._folder.trial(trial_id) / "checkpoint.pt").exists()
        }

    def _pruned_row(self, trial_id: str, last: Mapping[str, Any]) -> dict[str, Any]:
        said = {name: last[name] for name in (*METRIC_COLUMNS, "train_s", "epoch") if name in last}
        return {
            **identity(self._plan, self._trials[trial_id]),
            **said,
            "status": "pruned",
            "stop_reason": str(StopReason.PRUNED),
            "steps": last.get("step", 0),
            "epochs": said.pop("epoch", None),
            "config": json.dumps(dict(self._trials[trial_id].config)),
        }

    def _row_path(self, trial_id: str) -> Path:
        return self._folder.trial(trial_id) / "row.json"

    def _write(self, trial_id: str, row: Mapping[str, Any]) -> None:
        path = self._row_path(trial_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        times = {"started_at": self._started.get(trial_id, time.time()), "ended_at": time.time(), "train_s": 0.0}
        write_json(path, {**times, **row})

    def _end(self, trial_id: str, otherwise: str) -> None:
        path = self._row_path(trial_id)
        if not path.exists():
            self._write(trial_id, failed_row(self._plan, self._trials[trial_id], otherwise))
        if trial_id not in self._told:
            self._told.add(trial_id)
            self._board.end(json.loads(path.read_text()))
        self._folder.write_trials()


def _last_words(trial: Any) -> str:
    """The last line of the error that Tune has kept of a trial; empty where there is none."""
    with contextlib.suppress(OSError, TypeError):
        lines = [line.strip() for line in Path(trial.error_file).read_text().splitlines() if line.strip()]
        return lines[-1][:500] if lines else ""
    return ""
