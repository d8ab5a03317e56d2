"""A single run as each process of a group does it: the same calls in all of them, the first one writes. Knows no Ray."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from hamu.errors import HamuError
from hamu.models.record import json_text
from hamu.training.config import TrainConfig
from hamu.training.groups import Group, is_partner_gone
from hamu.training.loop import TrainingRun
from hamu.training.memory import keep_freed_memory
from hamu.training.records import replacing
from hamu.training.session import Session
from hamu.training.stop import StopReason

MAX_FAILURES = 2
"""How often a run may fail before it comes to another checkpoint."""

UNSAID = "a worker process died (killed, or out of memory)"

_STARTS = "starts.json"
_FAILURE = "failure.txt"


class SessionJob:
    """A run that several processes share, opened by `begin` and driven by `advance`.

    Args:
        group: the processes.
    """

    def __init__(self, group: Group) -> None:
        keep_freed_memory()
        self._group = group
        self._session: Session
        self._run: TrainingRun
        self._reports: Iterator[dict[str, Any]]
        self._given_up: dict[str, Any] = {}  # the reply instead of training

    def begin(self, *, config: Mapping[str, Any], folder: str, run_id: str, measure: bool = True) -> dict[str, Any]:
        """Set the run up, to go on from its checkpoint if there is one. Begun again in new processes when the old ones died.

        Args:
            config: as `TrainConfig.to_flat`.
            folder: the working directory, which relative paths start from.
            run_id: of the command; failures of earlier ones do not count.
            measure: whether the hardness is asked for.

        Returns:
            `total_steps`; `hardness` at the first batches (empty for a method without a constraint). Or `refused`: why the
            input cannot be run.
        """
        os.chdir(folder)
        refused = ""
        try:
            self._session = Session(TrainConfig.from_flat(config), device=self._group.device)
            self._run = self._session.start(self._group)
        except HamuError as error:
            refused = str(error)
        if refused := self._said_by_any(refused):
            return {"refused": refused}
        if failed := self._said_by_any(self._count_start(run_id) if self._group.is_first else ""):
            self._given_up = {"ended": True, "failed": failed}
            return self._given_up
        self._reports = iter(self._run)
        is_measured = measure and self._run.method.is_constrained
        return {"total_steps": self._run.total_steps, "hardness": self._run.measure_hardness() if is_measured else {}}

    def advance(self, *, budget_s: float, stop: bool = False) -> dict[str, Any]:
        """Train until the next evaluation, for `budget_s` seconds at most (or one step), or to the end.

        Args:
            budget_s: of the first process's clock.
            stop: end the run before its next step; model and checkpoint are kept.

        Returns:
            `ended`; the last report's numbers; at the end `row`, as `RunResult.row`, and `model_folder`; or `failed`, the error
            of a run that has failed twice since its last checkpoint.
        """
        if self._given_up:
            return self._given_up
        try:
            return self._advance(budget_s, stop)
        except Exception as error:
            said = f"rank {self._group.rank}: {type(error).__name__}: {error}"
            self._note_failure(UNSAID if is_partner_gone(error) else said)
            raise

    def _advance(self, budget_s: float, stop: bool) -> dict[str, Any]:
        if stop:
            self._run.request_stop(StopReason.CANCELLED)
        self._run.pause_at(time.monotonic() + budget_s)
        for report in self._reports:
            if report["kind"] == "evaluation" or self._run.is_pause_due:
                return {**report, "ended": False}
        if not self._group.is_first:
            return {"ended": True}
        row = self._session.finish(self._run).row()
        for name in (_STARTS, _FAILURE):
            (self._session.folder / name).unlink(missing_ok=True)
        return {"ended": True, "step": self._run.step, "row": row, "model_folder": str(self._session.model_folder)}

    def _said_by_any(self, text: str) -> str:
        """What the first process that has something to say says; all call it."""
        return next(filter(None, self._group.gather_texts(text)), "")

    def _count_start(self, run_id: str) -> str:
        """Write down that the run is begun from its present checkpoint; where that has failed twice, give the last error."""
        folder, checkpoint = self._session.folder, self._session.checkpoint
        now = {"run_id": run_id, "checkpoint": checkpoint.stat().st_mtime_ns if checkpoint.exists() else None}
        starts: list[dict[str, Any]] = []
        with contextlib.suppress(OSError, ValueError):
            starts = [start for start in json.loads((folder / _STARTS).read_text()) if start == now]
        failure = UNSAID
        with contextlib.suppress(OSError):
            failure = (folder / _FAILURE).read_text()
        if len(starts) >= MAX_FAILURES:
            return failure
        (folder / _FAILURE).unlink(missing_ok=True)
        with replacing(folder / _STARTS) as temporary:
            temporary.write_text(json_text([*starts, now]) + "\n")
        return ""

    def _note_failure(self, error: str) -> None:
        # The first one knows the reason; the others only miss that process.
        with contextlib.suppress(OSError), (self._session.folder / _FAILURE).open("x") as file:
            file.write(error)
