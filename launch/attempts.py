"""How often a trial was begun, and what became of it: attempts.json in the trial's folder.

A process may die in the middle of a trial without a word. Whoever begins the trial next finds an attempt that was never closed,
so a trial that takes its process down is not tried for ever. A death on a node that was lost, or taken away, is not the trial's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from hamu.cli.security import without_secrets
from hamu.errors import LeaseError
from hamu.storage import mount
from hamu.storage.files import CorruptError, read_json
from hamu.storage.shared_json import changing_json

MAX_DEATHS = 2
"""Attempts of one run of the sweep in which a trial may take its process down; then it has failed."""

ATTEMPTS = "attempts.json"

UNSAID = "its process died (killed, or out of memory)"


class Attempts:
    """The attempts at one trial, oldest first: a list of `{"run": id, "nodes": ids, "error": text or null, "closed": bool}`.

    An attempt is closed when its trial was left in order, ended or not.

    Args:
        folder: of the trial.
        run: id of this run of the sweep; a sweep that is resumed tries its trials anew.
        nodes: ids of the nodes that the trial's processes are on.
        gone: gives the ids of the nodes that are dead or about to be taken away, now.
    """

    def __init__(
        self, folder: Path, run: str, *, nodes: Sequence[str] = (), gone: Callable[[], Collection[str]] | None = None
    ) -> None:
        self._run, self._nodes, self._gone = run, list(nodes), gone
        self._path = folder / ATTEMPTS

    def open(self) -> str | None:
        """Begin an attempt; where too many have died, begin none and return the last known error."""
        with changing_json(self._path, []) as attempts:  # processes of one trial may fail together, on several nodes
            died = [each for each in attempts if each["run"] == self._run and not each["closed"]]
            if len(died) >= MAX_DEATHS and self._gone is not None:
                gone = set(self._gone())
                died = [each for each in died if not gone.intersection(each.get("nodes", ()))]
            if len(died) >= MAX_DEATHS:
                return next((each["error"] for each in reversed(died) if each["error"]), UNSAID)
            attempts.append({"run": self._run, "nodes": self._nodes, "error": None, "closed": False})
            return None

    def note(self, error: str) -> bool:
        """Write down what the present attempt is about to die of; the first of its processes to say so is right, and is told."""
        try:
            with changing_json(self._path, []) as attempts:
                is_news = bool(attempts) and attempts[-1]["error"] is None
                if is_news:
                    attempts[-1]["error"] = without_secrets(error)[:2000]
                return is_news
        except LeaseError:  # some other process keeps it: this one is about to die of what it was to say, not of this
            return False

    def close(self) -> None:
        """The present attempt is left in order, its trial ended or not."""
        with changing_json(self._path, []) as attempts:
            if attempts:
                attempts[-1]["closed"] = True

    @property
    def count(self) -> int:
        """Attempts of all runs so far."""
        return len(self._read())

    def _read(self) -> list[dict[str, Any]]:
        mount.fetch(self._path)
        try:
            found = read_json(self._path)
        except (OSError, CorruptError):
            return []
        return found if isinstance(found, list) else []


def attempts_at(folder: Path) -> int:
    """How often the trial of a folder was begun, in all runs, by whichever process."""
    return Attempts(folder, "").count


def was_begun(folder: Path) -> bool:
    """Whether a slot has ever begun the trial of a folder; one that was only found not to run may have a folder too."""
    return mount.exists(folder / ATTEMPTS)


def begun_among(trials: Path, trial_ids: Iterable[str]) -> list[str]:
    """Those of some trials that a slot has ever begun, as `was_begun`; a store is asked once for all of them.

    trials: the folder of the trials' folders.
    """
    mount.fetch(trials, only=lambda name: name.endswith(f"/{ATTEMPTS}"))
    return [trial_id for trial_id in trial_ids if (trials / trial_id / ATTEMPTS).exists()]
