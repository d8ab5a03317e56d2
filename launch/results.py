"""The folder of a sweep: its plan, its trials' rows, its lease. All that a resumed sweep knows is in here, as text and Parquet.

sweep.json                what is to run, written before anything starts
originals.json            hashes of the weights that the trials start from
references.json           the retain-only models that trials are compared with, and their metrics
probe.json                what the first pairs of gradients allow, where that was asked for
search.json               the view that a search goes by, and why it proposes no more trials, once it does not
runs.json                 when trials ran, an entry for each run of the sweep; runs-<i>-of-<n>.json: for those of a share of it
trials/<id>/row.json      the trial has ended; there iff it did
trials/<id>/checkpoint.pt where an unfinished trial goes on from
trials/<id>/attempts.json how often it was begun, and what became of that
trials/<id>/model/        the unlearned model
trials/<id>/.lease.<g>    who runs the trial
records/                  rows of steps and evaluations
trials.parquet, summary.json, pareto.png, report.html
.lease.<g>                who runs the sweep, in the g-th generation; lost when that process dies (launch/sweep_lease.py)
.lease-part-<i>-of-<n>.<g>  who runs the i-th of n shares of the sweep, each on a node of its own
.lease-<name>.<g>         who adds to that file, which several processes share
<name>.corrupt-<n>        a broken file, set aside for the user to look at (launch/repair.py)

Whatever is written once has a checksum: the JSON files as an entry "sha256", the Parquet files and the checkpoints inside. All
of it lies in a folder of this machine, of NFS, or in the mirror of a store (hamu/storage/mount.py), which is fetched from before
a file of other processes is read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from hamu.cli.security import check_owner
from hamu.errors import ConfigError, CorruptError, DataError, unknown
from hamu.storage import files, mount
from hamu.storage.files import write_json
from hamu.storage.lease import Lease
from hamu.training.records import TRIAL_SCHEMA, write_trials
from launch.kept_files import KeptFiles
from launch.plan import Plan
from launch.standing import has_ended, standing
from launch.sweep_lease import LEASE, TRIAL_PATIENCE_S, hold_sweep, trial_lock

__all__ = ["PLAN", "TRIAL_PATIENCE_S", "SweepFolder", "check_free", "find_sweep", "trial_lock", "write_json"]

PLAN = "sweep.json"
_WRITE_EVERY_S = 3.0
_WRITE_SHARE = 0.02  # of the time, at most, goes into trials.parquet while trials run


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
        self._kept = KeptFiles()
        self._keys: dict[str, str | None] | None = None
        self._write_after = 0.0
        self._is_full = False

    def runs_of(self, part: str | None) -> Path:
        """The runs.json of a share of the sweep ("2-of-4"); None: of the sweep."""
        return self.path / ("runs.json" if part is None else f"runs-{part}.json")

    def start(self, plan: Plan) -> None:
        """Make the folder and write the plan; call it while holding the lease.

        Raises:
            ConfigError: the plan of another sweep is there, of which this one has not all trials.
        """
        if self.has_plan():
            stored, own = self.read_plan(plan.root), {trial.trial_id for trial in plan.trials}
            if stored.space != plan.space or not own.issuperset(trial.trial_id for trial in stored.trials):
                raise ConfigError(
                    f"{mount.shown(self.path)} holds another sweep's plan ({len(stored.trials)} trials of {stored.space!r}); "
                    f"go on with --resume {stored.name}, or choose another --name"
                )
        self.records.mkdir(parents=True, exist_ok=True)
        self.trials.mkdir(exist_ok=True)
        write_json(self.plan_path, plan.to_json())

    def has_plan(self) -> bool:
        """Whether a sweep was begun here, by whichever machine."""
        mount.look(self.plan_path)
        return self.plan_path.exists()

    def read_plan(self, root: Path) -> Plan:
        """Read the plan back, with `root` as its artifact root (the folder may have moved).

        Raises:
            DataError: no plan, or not one of ours.
        """
        mount.fetch(self.plan_path)
        try:
            return Plan.from_json(files.read_json(self.plan_path), root)
        except CorruptError as error:
            raise DataError(
                f"{mount.shown(self.plan_path)} is not a plan of this program ({error.why}); restore it from a copy, or choose "
                "another --name"
            ) from None
        except FileNotFoundError:
            raise DataError(
                f"{mount.shown(self.path)} has no {PLAN}, so it is no sweep's folder; choose another --name"
            ) from None
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{mount.shown(self.plan_path)} is not a plan of this program ({error!r}); choose another --name"
            ) from None

    def trial(self, trial_id: str) -> Path:
        """A trial's own folder."""
        return self.trials / trial_id

    def rows(self) -> dict[str, dict[str, Any]]:
        """Rows of the trials that ended (finished, failed, pruned or dropped), by id, in the order of their ids.

        They are kept here, so do not change them. A trial whose row is broken has none (`launch.repair` sets it aside).
        """
        mount.fetch(self.trials, only=_is_row)
        try:
            with os.scandir(self.trials) as entries:
                ids = sorted(entry.name for entry in entries)
        except FileNotFoundError:
            return {}
        return {trial_id: row for trial_id in ids if (row := self._kept.read(self._row_path(trial_id)))}

    def row(self, trial_id: str) -> dict[str, Any]:
        """A trial's row, empty until it has ended; kept here, so do not change it."""
        mount.fetch(self._row_path(trial_id))
        return self._kept.read(self._row_path(trial_id))

    def _row_path(self, trial_id: str) -> Path:
        return self.trials / trial_id / "row.json"

    def references(self) -> dict[str, dict[str, Any]]:
        """The retain-only models that are known: key -> {"path", "result"}, or {"error"} where there is none."""
        mount.fetch(self.references_path)
        return self._kept.read(self.references_path)

    def search_state(self) -> dict[str, Any]:
        """What search.json holds (`launch.proposals.write_search`); empty where no search has begun."""
        mount.fetch(self.search_path)
        return self._kept.read(self.search_path)

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

    def write_trials(self, *, wait: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
        """Write trials.parquet from the trials' rows, and return those, in the columns of TRIAL_SCHEMA.

        wait: as in `files.patiently`, for a storage that is full.
        """
        started = time.monotonic()
        rows = [{key: row.get(key) for key in TRIAL_SCHEMA.names} for row in self.compared_rows()]
        write_trials(self.trials_parquet, rows, wait=wait)
        ended = time.monotonic()
        self._write_after = ended + max(_WRITE_EVERY_S, (ended - started) / _WRITE_SHARE)
        return rows

    def refresh_trials(self) -> None:
        """Write trials.parquet, unless that was done a few seconds ago; for whoever looks while trials run.

        A storage that is full is no reason to hold the sweep up: that is said once, and tried again seconds later.
        """
        if time.monotonic() < self._write_after:
            return
        try:
            self.write_trials(wait=files.unwilling)
            self._is_full = False
        except files.StorageFullError as full:
            self._write_after = time.monotonic() + _WRITE_EVERY_S
            if not self._is_full:
                files.tell(f"{full}; {self.trials_parquet.name} is not brought up to date meanwhile")
            self._is_full = True

    def _reference_keys(self) -> dict[str, str | None]:
        """Which retain-only model a trial is compared with, as the plan says."""
        if self._keys is None:
            mount.fetch(self.plan_path)
            trials = files.read_json(self.plan_path)["trials"]
            self._keys = {trial["trial_id"]: trial.get("reference") for trial in trials}
        return self._keys

    def lease(self, part: str | None = None, *, say: Callable[[str], None] | None = None) -> AbstractContextManager[Lease]:
        """Hold the folder, or a share of the sweep such as "1-of-4", while it runs: `launch.sweep_lease.hold_sweep`."""
        return hold_sweep(self.path, part, say=say)


def find_sweep(root: Path, name: str) -> SweepFolder:
    """Find a sweep to resume by "<sweep>" or "<task>/<sweep>".

    Raises:
        ConfigError: no such sweep, one in several tasks, one in a folder of another user, or one in a store that a dry run
            leaves alone.
    """
    results = root / "results"
    if mount.is_left_alone(results):
        raise ConfigError(
            f"--resume {name} --dry-run: a dry run does not look into a store, and what sweep {name!r} has still to run lies in "
            f"{mount.shown(results)}; leave out --dry-run, or give --name and the flags of a new sweep"
        )
    mount.fetch(results, only=lambda name: name.count("/") == 2 and name.endswith(f"/{PLAN}"))
    known = {f"{path.parent.parent.name}/{path.parent.name}": path.parent for path in results.glob(f"*/*/{PLAN}")}
    found = [full for full in sorted(known) if name.strip("/") in (full, full.split("/")[1])]
    if not found:
        if not known:
            raise ConfigError(
                f"no sweep {name!r} to resume: {mount.shown(results)} holds none; give --storage-path, or start one with --name"
            )
        raise ConfigError(unknown("sweep", name, [full.split("/")[1] for full in known]))
    if len(found) > 1:
        raise ConfigError(f"{len(found)} sweeps are called {name!r}; give --resume {' or --resume '.join(found)}")
    folder = known[found[0]]
    if mount.store_of(folder) is None:  # a store has its own rules of who may write
        check_owner(folder)
    return SweepFolder(folder)


def check_free(folder: SweepFolder, *, space: str, root: Path) -> None:
    """Refuse to start a new sweep in a folder that holds something.

    Raises:
        ConfigError: a sweep of this space is there (resume it), one of another space, or other files.
        DataError: its plan cannot be read.
    """
    name = folder.path.name
    if not folder.has_plan():
        if any(not found.startswith(LEASE) for found in mount.listed(folder.path)):
            raise ConfigError(f"{mount.shown(folder.path)} exists and is no sweep's folder; choose another --name than {name!r}")
        return
    plan = folder.read_plan(root)
    if plan.space != space:
        raise ConfigError(
            f"{mount.shown(folder.path)} belongs to a sweep of space {plan.space!r}, not {space!r}; choose another --name"
        )
    stand = standing(plan, folder.rows())
    raise ConfigError(
        f"sweep {name!r} exists in {mount.shown(folder.path)} ({stand.n_ended} of {stand.n_total} trials finished); "
        f"go on with --resume {name}, or choose another --name"
    )


def _is_row(name: str) -> bool:
    return name.endswith("/row.json")
