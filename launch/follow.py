"""What the driver of a sweep does when Tune tells it of its trials: the board, the rows that no slot could write."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from hamu.storage import mount
from hamu.storage.files import write_json, write_new_json
from hamu.training.records import METRIC_COLUMNS
from hamu.training.stop import StopReason
from launch.attempts import attempts_at
from launch.live import Board
from launch.nodes import Watch
from launch.notices import Notices
from launch.plan import Plan
from launch.results import SweepFolder
from launch.runs import Runs
from launch.shared import failed_row, identity
from launch.signals import Signals
from launch.standing import has_ended
from launch.trainable import overrides_of, said_of, state_of

MAX_BARREN = 4
"""How often Tune starts a trial again whose slot died before it could begin it. Deaths after that are counted by the slots."""

_SEEN_WITHIN_S = 10.0
_WAIT_FOR_ROWS_S = 60.0
_LOOK_EVERY_S = 0.2
_POLL_EVERY_S = 3.0
_SAVED_WITHIN_S = 10.0
_LEFT_OPEN = "a resumed sweep sees it, or runs the trial again"


class Follow(tune.Callback):
    """Tells the board and the results folder what happens to the trials.

    A trial that a scheduler or a stopper ends gets a row here that says so, "pruned"; its slot, which looks for that row when it
    leaves the trial, puts the whole row and the model in its place. `to_complete` lists those that no slot was left for.

    A row that a slot has written is never replaced, whether it can be seen here or not: what is written here is created, not
    replaced, and of a trial that said how it ended nothing is. Its row may come late, from another node; it is looked for until
    it is there, or the trials are over.

    Args:
        plan, folder, board, signals: of the sweep.
        tell: called with the id and the row of each trial that has ended, once; the row has what retain-only models add.
        poll: called every few seconds.
        runs: keeps when trials ran.
        watch: is shown the trials, and says which of them wait for a node.
        notices: by which running trials are asked to save themselves when a signal has come; without, it ends them at once.
    """

    def __init__(
        self,
        plan: Plan,
        folder: SweepFolder,
        board: Board,
        signals: Signals,
        *,
        tell: Callable[[str, Mapping[str, Any]], None] | None = None,
        poll: Callable[[], object] | None = None,
        runs: Runs | None = None,
        watch: Watch | None = None,
        notices: Notices | None = None,
    ) -> None:
        self._plan, self._folder, self._board, self._signals = plan, folder, board, signals
        self._tell, self._poll, self._poll_after, self._runs = tell, poll, 0.0, runs
        self._trials = {trial.trial_id: trial for trial in plan.trials}
        self._started: dict[str, float] = {}
        self._told: set[str] = set()
        self._stopped: dict[str, dict[str, Any]] = {}
        self._watch, self._notices = watch, notices
        self._reported: dict[str, float] = {}
        self._barren: dict[str, tuple[int, int]] = {}  # trial -> its attempts at its slot's last death, deaths since it was begun
        self._hold_until: float | None = None
        self._late: dict[str, float] = {}  # trials that have ended and whose row is not seen: when that is to be said
        self._look_after = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks, for a way to resume that is not ours

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune looks for news, several times a second."""
        if self._signals.number is not None:
            self._end_in_order(trials)
        if self._watch is not None and self._watch.is_due:
            self._watch.poll(sorted(trials, key=lambda trial: self._reported.get(str(trial), 0.0)))
        if self._late and time.monotonic() >= self._look_after:
            self._look_for_rows()
        if time.monotonic() >= self._poll_after:
            if self._poll is not None:
                self._poll()
            if self._runs is not None:
                self._runs.note()
            self._poll_after = time.monotonic() + _POLL_EVERY_S

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A slot has taken the trial."""
        self._started.setdefault(str(trial), time.time())

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """The trial has trained on."""
        self._reported[str(trial)] = time.monotonic()
        trial.max_failures = -1  # it has begun; from here on its attempts decide
        if str(trial) not in self._told:
            self._board.update(str(trial), said_of(result))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial has ended and written its row, or is stopped here."""
        trial_id, last = str(trial), said_of(trial.last_result or {})
        _forget_history(trial)
        if "status" in last:
            self._expect_row(trial_id)
            return
        if not self._row(trial_id):
            saved = trial.checkpoint if trial.status in (Trial.PAUSED, Trial.PENDING) else None
            self._stopped[trial_id] = {"state": state_of(saved.path) if saved else "", **overrides_of(trial.config)}
            self._write_new(trial_id, self._pruned_row(trial_id, last))
        self._end(trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's process has died once too often."""
        trial_id = str(trial)
        if "status" in said_of(trial.last_result or {}):
            self._expect_row(trial_id)
            return
        if not self._row(trial_id):
            times = f"its process died {MAX_BARREN + 1} times before it could begin"
            error = f"{times}: {_last_words(trial) or 'killed, or out of memory'}"
            self._write_new(trial_id, failed_row(self._plan, self._trials[trial_id], error))
        self._end(trial_id)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Tune has no more trials to run; the rows that are late are waited for."""
        deadline = time.monotonic() + _WAIT_FOR_ROWS_S
        while self._late and time.monotonic() < deadline:
            self._look_for_rows()
            if self._late:
                self._signals.check()
                time.sleep(_LOOK_EVERY_S)
        for trial_id in self._late:
            self._board.say(f"the row of {trial_id} did not come within {_WAIT_FOR_ROWS_S:g} s; {_LEFT_OPEN}")
        self._late.clear()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's process has died, or has left its node, and Tune starts another."""
        trial_id, why = str(trial), _last_words(trial)
        self._reported.pop(trial_id, None)
        if "NodeDraining" in why:
            self._board.say(f"{trial_id} is saved and leaves its node, which is to be taken away; it goes on elsewhere")
            return
        n_begun = attempts_at(self._folder.trial(trial_id))
        n_before, n_barren = self._barren.get(trial_id, (-1, 0))
        n_barren = n_barren + 1 if n_begun == n_before else 1
        self._barren[trial_id] = n_begun, n_barren
        if n_barren >= MAX_BARREN:
            trial.max_failures = 0  # the next one is an error to Tune
        what = "the node" if "its node" in why else "the process"
        self._board.say(f"{what} of {trial_id} died; the trial goes on from its checkpoint")

    def to_complete(self) -> dict[str, dict[str, Any]]:
        """Trials that were stopped while no slot had them, or whose slot died over it, but for those without any state.

        Each with `state` (a folder, or "" for the trial's own checkpoint) and the settings that a scheduler had changed.
        """
        left = {trial_id: each for trial_id, each in self._stopped.items() if not has_ended(self._folder.row(trial_id))}
        return {
            trial_id: each
            for trial_id, each in left.items()
            if each["state"] or mount.exists(self._folder.trial(trial_id) / "checkpoint.pt")
        }

    def _end_in_order(self, trials: list[Any]) -> None:
        """Have the running trials save themselves while Tune's loop turns; then raise the signal that has come."""
        now = time.monotonic()
        if self._notices is not None and self._hold_until is None:
            self._notices.hold()
            self._hold_until = now + _SAVED_WITHIN_S
        running = {str(trial) for trial in trials if trial.status == Trial.RUNNING} & self._reported.keys()
        if self._notices is None or self._hold_until is None or now >= self._hold_until or running <= self._notices.saved():
            self._signals.check()

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

    def _row(self, trial_id: str) -> dict[str, Any]:
        """A trial's row, as whoever wrote it last has left it."""
        mount.look(self._row_path(trial_id))
        return self._folder.row(trial_id)

    def _write_new(self, trial_id: str, row: Mapping[str, Any]) -> None:
        """Write a row, unless the trial's slot has written one meanwhile."""
        write_row(self._folder, trial_id, row, started_at=self._started.get(trial_id), replaces=False)

    def _expect_row(self, trial_id: str) -> None:
        """End a trial whose slot has written its row before it said so; a network folder may be late."""
        if self._row(trial_id):
            self._end(trial_id)
        else:
            self._late[trial_id] = time.monotonic() + _SEEN_WITHIN_S

    def _look_for_rows(self) -> None:
        for trial_id, say_after in list(self._late.items()):
            if self._row(trial_id):
                del self._late[trial_id]
                self._end(trial_id)
            elif time.monotonic() >= say_after:
                self._late[trial_id] = math.inf
                where = mount.shown(self._row_path(trial_id))
                self._board.say(f"{trial_id} has ended, and its row {where} is not to be seen yet; looking on")
        self._look_after = time.monotonic() + _LOOK_EVERY_S

    def _end(self, trial_id: str) -> None:
        if trial_id not in self._told:
            self._told.add(trial_id)
            for row in self._folder.compared_rows([trial_id]):
                self._board.end(row)
                if self._tell is not None:
                    self._tell(trial_id, row)
                break
            else:  # of a broken file, which stays for the repair
                self._board.say(f"the row {mount.shown(self._row_path(trial_id))} cannot be read; {_LEFT_OPEN}")
        self._folder.refresh_trials()
        if self._runs is not None:
            self._runs.note()


def write_row(
    folder: SweepFolder, trial_id: str, row: Mapping[str, Any], *, started_at: float | None = None, replaces: bool = True
) -> None:
    """Write the row of a trial that no slot could write; one without times ended now. replaces: a row that is there, too."""
    path = folder.trial(trial_id) / "row.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    now = time.time()
    write = write_json if replaces else write_new_json
    write(path, {"started_at": started_at or now, "ended_at": now, "train_s": 0.0, **row})


def _forget_history(trial: Any) -> None:
    """Drop the averages that Tune keeps of all that an ended trial told it: of a thousand trials they are most of its memory."""
    for name in ("metric_analysis", "metric_n_steps"):
        kept = getattr(trial.run_metadata, name, None)
        if isinstance(kept, dict):
            kept.clear()


def _last_words(trial: Any) -> str:
    """The last line of the error that Tune has kept of a trial; empty where there is none."""
    with contextlib.suppress(OSError, TypeError):
        lines = [line.strip() for line in Path(trial.error_file).read_text().splitlines() if line.strip()]
        return lines[-1][:500] if lines else ""
    return ""
