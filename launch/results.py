"""The folder of a sweep: its plan, its trials' rows, its lease. All that a resumed sweep knows is in here, as text and Parquet.

sweep.json                what is to run, written before anything starts
originals.json            hashes of the weights that the trials start from
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
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hamu.errors import ConfigError, DataError, unknown
from hamu.models.record import json_text
from hamu.training.records import TRIAL_SCHEMA, replacing, write_trials
from launch.plan import Plan

PLAN = "sweep.json"


class SweepFolder:
    """One sweep's results folder.

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
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"

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
        """Rows of the trials that ended (finished or failed), by id, in the order of their ids."""
        found = {}
        for path in sorted(self.trials.glob("*/row.json")):
            try:
                found[path.parent.name] = json.loads(path.read_text())
            except FileNotFoundError:
                continue  # a resumed trial has just taken it away
        return found

    def unfinished(self, plan: Plan) -> list[str]:
        """Ids of the trials that have still to run: all but those that finished or were pruned. A failed one is tried again."""
        rows = self.rows()
        return [trial.trial_id for trial in plan.trials if not has_ended(rows.get(trial.trial_id, {}))]

    def write_trials(self) -> list[dict[str, Any]]:
        """Refresh trials.parquet from the trials' rows, and return those, in the columns of TRIAL_SCHEMA."""
        rows = [{key: row.get(key) for key in TRIAL_SCHEMA.names} for row in self.rows().values()]
        write_trials(self.trials_parquet, rows)
        return rows

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


def has_ended(row: Mapping[str, Any]) -> bool:
    """Whether a trial's row says that it need not run again.

    A pruned trial has ended when its model is kept; until then its row only says that a scheduler has stopped it.
    """
    return row.get("status") == "finished" or (row.get("status") == "pruned" and bool(row.get("model_path")))


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
    left = len(folder.unfinished(plan))
    raise ConfigError(
        f"sweep {name!r} exists in {folder.path} ({len(plan.trials) - left} of {len(plan.trials)} trials finished); "
        f"go on with --resume {name}, or choose another --name"
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON at once; numbers that JSON lacks (nan, infinity) become null."""
    with replacing(path) as temporary:
        temporary.write_text(json_text(value, indent=1) + "\n")


def _owner(file: IO[str]) -> str:
    try:
        file.seek(0)
        owner = json.loads(file.read())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
