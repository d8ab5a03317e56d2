"""A trial's folder while a slot has it: taken with a lease, written only while that is held, left in order or not at all."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hamu.cli.security import without_secrets
from hamu.storage import mount
from hamu.storage.files import patiently, set_aside, write_json
from hamu.storage.lease import Lease
from hamu.training.records import Recorder
from launch.attempts import Attempts
from launch.standing import has_ended
from launch.states import drop_foreign_state, metrics_of, take_state
from launch.sweep_lease import trial_lock
from launch.trial_row import read_row


class TrialFolder:
    """The folder of one trial, as the processes of a slot see it; the first of them takes it.

    Args:
        path: of the folder.
        run_id: of this run of the sweep.
        nodes: ids of the nodes that the processes are on.
        gone: gives the ids of the nodes that are dead or about to be taken away, now.
    """

    def __init__(
        self, path: Path, run_id: str, *, nodes: Sequence[str] = (), gone: Callable[[], Collection[str]] | None = None
    ) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self.model = path / "model"
        self._row_path = path / "row.json"
        self._held = contextlib.ExitStack()
        self._lease: Lease | None = None
        self._attempts = Attempts(path, run_id, nodes=nodes, gone=gone)
        self._is_open = False

    def take(self) -> tuple[dict[str, Any], str | None]:
        """Take the folder and begin an attempt, unless the trial has ended or has died too often.

        Returns:
            The row of the trial if it has ended, else an empty one; and why it is not to be tried again, if so.

        Raises:
            LeaseError: another process has it, and still had after some minutes.
        """
        self._lease = self._held.enter_context(trial_lock(self.path))
        mount.fetch(self.path, only=lambda name: "/" not in name)
        row = self.row()
        if has_ended(row):  # written by a process that died before it could say so
            return row, None
        if row.get("status") == "failed":
            mount.remove(self._row_path)
        died_of = patiently(self._attempts.open, folder=self.path)
        self._is_open = died_of is None
        return {}, died_of

    def take_state(self, load_from: str | None, *, trial_id: str, recipe: str) -> tuple[bool, dict[str, Any]]:
        """Put the state to go on from in its place: whether it is another trial's or recipe's, and its numbers then."""
        if load_from is None:
            drop_foreign_state(self.path, recipe=recipe)
            return False, {}
        mount.fetch(Path(load_from))
        state = Path(load_from)
        take = functools.partial(take_state, state, self.path, trial_id=trial_id, recipe=recipe)
        return patiently(take, folder=self.path), metrics_of(state)

    def check(self) -> None:
        """To be called before anything is written.

        Raises:
            LeaseError: the folder is another process's by now.
        """
        if self._lease is not None:
            self._lease.check()

    def recorder(self, records: Path, identity: Mapping[str, Any]) -> Recorder:
        """Make what writes the trial's records, while the folder is this process's."""
        assert self._lease is not None, "the first process has taken the folder"
        return _OwnersRecorder(records, identity, self._lease)

    def row(self) -> dict[str, Any]:
        """The trial's row; empty where there is none."""
        return read_row(self._row_path)

    def write_row(self, row: Mapping[str, Any]) -> None:
        """Write the trial's row: it has ended."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.check()
        write_json(self._row_path, dict(row))

    @property
    def n_attempts(self) -> int:
        """How often the trial was begun, in all runs."""
        return self._attempts.count

    def drop_checkpoint(self) -> None:
        """Remove the trial's checkpoint."""
        mount.remove(self.checkpoint)

    def set_checkpoint_aside(self) -> Path:
        """Put a broken checkpoint out of the way, and say where it is."""
        return set_aside(self.checkpoint)

    def write_trace(self, trace: str) -> None:
        """Keep what went wrong, for whoever looks into it."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "error.txt").write_text(without_secrets(trace))
        mount.publish(self.path / "error.txt")

    def abandon(self, error: Exception | None = None, text: str = "") -> None:
        """Leave the folder without closing the attempt: nothing of this process is to be relied on. Any process may do it.

        error: what this process dies of, with its `text`, for whoever begins the trial next.
        """
        if error is not None and self._attempts.note(text):
            self.write_trace("".join(traceback.format_exception(error)))
        self._is_open = False
        self._held.close()

    def close(self) -> None:
        """Leave the trial in order, ended or not."""
        if self._is_open:
            patiently(self._attempts.close, folder=self.path)
        self._is_open, self._lease = False, None
        self._held.close()


class _OwnersRecorder(Recorder):
    """Writes records only while the trial is this process's."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], lease: Lease) -> None:
        super().__init__(folder, identity)
        self._lease = lease

    def flush(self) -> None:
        self._lease.check()
        super().flush()

    def truncate(self, n_parts: int) -> None:
        self._lease.check()
        super().truncate(n_parts)

    def finish(self) -> None:
        self._lease.check()
        super().finish()
