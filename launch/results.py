"""The folder of a sweep: its plan, its trials' rows, its lease. All that a resumed sweep knows is in here, as text and Parquet.

sweep.json                what is to run, written before anything starts
originals.json            hashes of the weights that the trials start from
references.json           the retain-only models that trials are compared with, and their metrics
probe.json                what the first pairs of gradients allow, where that was asked for
search.json               the view that a search goes by, and why it proposes no more trials, once it does not
runs.json                 when trials ran, an entry for each run of the sweep
trials/<id>/row.json      the trial has ended; there iff it did
trials/<id>/checkpoint.pt where an unfinished trial goes on from
trials/<id>/attempts.json how often it was begun, and what became of that
trials/<id>/model/        the unlearned model
records/                  rows of steps and evaluations
trials.parquet, summary.json, pareto.png, report.html
.lease                    locked by the process that runs the sweep; the lock dies with it
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hamu.errors import ConfigError, DataError, unknown
from hamu.models.record import json_text
from hamu.training.records import TRIAL_SCHEMA, replacing, write_trials
from launch.plan import Plan
from launch.standing import has_ended, standing

PLAN = "sweep.json"
_WRITE_EVERY_S = 3.0
_WRITE_SHARE = 0.02  # of the time, at most, goes into trials.parquet while trials run

_READ_ATTEMPTS = 100

_Stamp = tuple[int, int, int]


class SweepFolder:
    """One sweep's results folder. What it has read is kept: a file is read again when it has changed.

    Args:
        path: `<root>/results/<task>/<sweep>`; made by `start`, not before.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.plan_path = self.path / PLAN
        self.records = self.path / "records"
        self.trials = self.path / "trials"
        self.trials_parquet = self.path / "trials.parquet"
        self.originals = self.path / "originals.json"
        self.references_path = self.path / "references.json"
        self.search_path = self.path / "search.json"
        self.runs_path = self.path / "runs.json"
        self.probe_path = self.path / "probe.json"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"
        self._read: dict[Path, tuple[_Stamp, dict[str, Any]]] = {}
        self._keys: dict[str, str | None] | None = None
        self._write_after = 0.0

    def start(self, plan: Plan) -> None:
        """Make the folder and write the plan; call it while holding the lease."""
        self.records.mkdir(parents=True, exist_ok=True)
        self.trials.mkdir(exist_ok=True)
        write_json(self.plan_path, plan.to_json())

    def read_plan(self, root: Path) -> Plan:
        """Read the plan back, with `root` as its artifact root (the folder may have moved).

        Raises:
            DataError: no plan, or not one of ours.
        """
        try:
            return Plan.from_json(json.loads(self.plan_path.read_text()), root)
        except FileNotFoundError:
            raise DataError(f"{self.path} has no {PLAN}, so it is no sweep's folder; choose another --name") from None
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{self.plan_path} is not a plan of this program ({error!r}); choose another --name") from None

    def trial(self, trial_id: str) -> Path:
        """A trial's own folder."""
        return self.trials / trial_id

    def rows(self) -> dict[str, dict[str, Any]]:
        """Rows of the trials that ended (finished, failed, pruned or dropped), by id, in the order of their ids.

        They are kept here, so do not change them.
        """
        try:
            with os.scandir(self.trials) as entries:
                ids = sorted(entry.name for entry in entries)
        except FileNotFoundError:
            return {}
        return {trial_id: row for trial_id in ids if (row := self.row(trial_id))}

    def row(self, trial_id: str) -> dict[str, Any]:
        """A trial's row, empty until it has ended; kept here, so do not change it."""
        return self._json(self.trials / trial_id / "row.json")

    def references(self) -> dict[str, dict[str, Any]]:
        """The retain-only models that are known: key -> {"path", "result"}, or {"error"} where there is none."""
        return self._json(self.references_path)

    def search_state(self) -> dict[str, Any]:
        """What search.json holds (`launch.proposals.write_search`); empty where no search has begun."""
        return self._json(self.search_path)

    def compared_rows(self, trial_ids: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """Rows with what their retain-only models add: `forget_closeness`, and `retrained_<metric>` columns.

        Args:
            trial_ids: those wanted; default: of all trials that ended, in the order of their ids.
        """
        rows = list(self.rows().values()) if trial_ids is None else [row for each in trial_ids if (row := self.row(each))]
        references = self.references()
        if not references:
            return rows
        from hamu.reports.closeness import with_references

        keys = self._reference_keys()
        return with_references(
            [{**row, "reference": row.get("reference") or keys.get(row["trial_id"])} for row in rows], references
        )

    def unfinished(self, plan: Plan) -> list[str]:
        """Ids of the trials that have still to run: all but those that ended for good. A failed one is tried again."""
        rows = self.rows()
        return [trial.trial_id for trial in plan.trials if not has_ended(rows.get(trial.trial_id, {}))]

    def write_trials(self) -> list[dict[str, Any]]:
        """Write trials.parquet from the trials' rows, and return those, in the columns of TRIAL_SCHEMA."""
        started = time.monotonic()
        rows = [{key: row.get(key) for key in TRIAL_SCHEMA.names} for row in self.compared_rows()]
        write_trials(self.trials_parquet, rows)
        ended = time.monotonic()
        self._write_after = ended + max(_WRITE_EVERY_S, (ended - started) / _WRITE_SHARE)
        return rows

    def refresh_trials(self) -> None:
        """Write trials.parquet, unless that was done a few seconds ago; for whoever looks while trials run."""
        if time.monotonic() >= self._write_after:
            self.write_trials()

    def _json(self, path: Path) -> dict[str, Any]:
        """The content of a file of ours that is replaced whole; empty where there is none."""
        for _ in range(_READ_ATTEMPTS):
            try:
                stamp = _stamp(path)
                known = self._read.get(path)
                if known is not None and known[0] == stamp:
                    return known[1]
                value = json.loads(path.read_text(), object_pairs_hook=_interned)
                if _stamp(path) == stamp:
                    self._read[path] = (stamp, value)
                    return value
            except (FileNotFoundError, NotADirectoryError):
                break  # a resumed trial has just taken it away
        self._read.pop(path, None)
        return {}

    def _reference_keys(self) -> dict[str, str | None]:
        """Which retain-only model a trial is compared with, as the plan says."""
        if self._keys is None:
            trials = json.loads(self.plan_path.read_text())["trials"]
            self._keys = {trial["trial_id"]: trial.get("reference") for trial in trials}
        return self._keys

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Hold the folder while the sweep runs. The kernel frees the lock of a process that dies.

        Raises:
            ConfigError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lease").open("a+") as file:  # not inherited: Ray's processes must not keep it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{self.path} is in use by {_owner(file)}; wait for it, stop it, or choose another --name"
                ) from None
            file.truncate(0)
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            file.write(json.dumps(owner))
            file.flush()
            yield


@contextmanager
def trial_lock(folder: Path, *, patience_s: float = 60.0) -> Iterator[None]:
    """Hold a trial's folder while it trains.

    After a `kill -9` of a sweep its workers live for a second or two. A resumed sweep waits here until they are gone, so
    two processes never write one trial.

    Raises:
        DataError: another process still has it after `patience_s` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DataError(f"{folder} is still written by another process; stop it, then resume") from None
                time.sleep(0.05)
        yield


def find_sweep(root: Path, name: str) -> SweepFolder:
    """Find a sweep to resume by "<sweep>" or "<task>/<sweep>".

    Raises:
        ConfigError: no such sweep, or one in several tasks.
    """
    results = root / "results"
    known = {f"{path.parent.parent.name}/{path.parent.name}": path.parent for path in results.glob(f"*/*/{PLAN}")}
    found = [full for full in sorted(known) if name.strip("/") in (full, full.split("/")[1])]
    if not found:
        if not known:
            raise ConfigError(f"no sweep {name!r} to resume: {results} holds none; give --storage-path, or start one with --name")
        raise ConfigError(unknown("sweep", name, [full.split("/")[1] for full in known]))
    if len(found) > 1:
        raise ConfigError(f"{len(found)} sweeps are called {name!r}; give --resume {' or --resume '.join(found)}")
    return SweepFolder(known[found[0]])


def check_free(folder: SweepFolder, *, space: str, root: Path) -> None:
    """Refuse to start a new sweep in a folder that holds something.

    Raises:
        ConfigError: a sweep of this space is there (resume it), one of another space, or other files.
        DataError: its plan cannot be read.
    """
    if not folder.path.exists():
        return
    name = folder.path.name
    if not folder.plan_path.exists():
        if any(entry.name != ".lease" for entry in folder.path.iterdir()):
            raise ConfigError(f"{folder.path} exists and is no sweep's folder; choose another --name than {name!r}")
        return
    plan = folder.read_plan(root)
    if plan.space != space:
        raise ConfigError(f"{folder.path} belongs to a sweep of space {plan.space!r}, not {space!r}; choose another --name")
    stand = standing(plan, folder.rows())
    raise ConfigError(
        f"sweep {name!r} exists in {folder.path} ({stand.n_ended} of {stand.n_total} trials finished); "
        f"go on with --resume {name}, or choose another --name"
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON at once; numbers that JSON lacks (nan, infinity) become null."""
    with replacing(path) as temporary:
        temporary.write_text(json_text(value, indent=1) + "\n")


def _interned(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict whose keys are shared with all others: a thousand rows have the same hundred."""
    return {sys.intern(key): value for key, value in pairs}


def _stamp(path: Path) -> _Stamp:
    """What a file that is replaced whole has another of."""
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size


def _owner(file: IO[str]) -> str:
    try:
        file.seek(0)
        owner = json.loads(file.read())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
