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
.lease.<g>                who runs the sweep, in the g-th generation; lost when that process dies (hamu/storage/lease.py)
.lease-part-<i>-of-<n>.<g>  who runs the i-th of n shares of the sweep, each on a node of its own
<name>.corrupt-<n>        a broken file, set aside for the user to look at (launch/repair.py)

Whatever is written once has a checksum: the JSON files as an entry "sha256", the Parquet files and the checkpoints inside. All
of it lies in a folder of this machine, of NFS, or in the mirror of a store (hamu/storage/mount.py), which is fetched from before
a file of other processes is read.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hamu.cli.security import check_owner
from hamu.errors import ConfigError, CorruptError, DataError, LeaseError, unknown
from hamu.storage import files, mount
from hamu.storage.files import write_json
from hamu.storage.lease import Lease, holder_of
from hamu.training.records import TRIAL_SCHEMA, write_trials
from launch.plan import Plan
from launch.standing import has_ended, standing

__all__ = ["PLAN", "TRIAL_PATIENCE_S", "SweepFolder", "check_free", "find_sweep", "trial_lock", "write_json"]

PLAN = "sweep.json"
TRIAL_PATIENCE_S = 150.0
"""Longer than a lost node's processes can go on: after a minute without its head Ray ends them."""

_WRITE_EVERY_S = 3.0
_WRITE_SHARE = 0.02  # of the time, at most, goes into trials.parquet while trials run

_READ_ATTEMPTS = 100

_LEASE = ".lease"
_PART_LEASE = ".lease-part-"

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
        self._is_full = False

    def runs_of(self, part: str | None) -> Path:
        """The runs.json of a share of the sweep ("2-of-4"); None: of the sweep."""
        return self.path / ("runs.json" if part is None else f"runs-{part}.json")

    def start(self, plan: Plan) -> None:
        """Make the folder and write the plan; call it while holding the lease."""
        self.records.mkdir(parents=True, exist_ok=True)
        self.trials.mkdir(exist_ok=True)
        write_json(self.plan_path, plan.to_json())

    def has_plan(self) -> bool:
        """Whether a sweep was begun here, by whichever machine."""
        mount.fetch(self.plan_path)
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
                f"{self.plan_path} is not a plan of this program ({error.why}); restore it from a copy, or choose another --name"
            ) from None
        except FileNotFoundError:
            raise DataError(f"{self.path} has no {PLAN}, so it is no sweep's folder; choose another --name") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{self.plan_path} is not a plan of this program ({error!r}); choose another --name") from None

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
        return {trial_id: row for trial_id in ids if (row := self._json(self._row_path(trial_id)))}

    def row(self, trial_id: str) -> dict[str, Any]:
        """A trial's row, empty until it has ended; kept here, so do not change it."""
        mount.fetch(self._row_path(trial_id))
        return self._json(self._row_path(trial_id))

    def _row_path(self, trial_id: str) -> Path:
        return self.trials / trial_id / "row.json"

    def references(self) -> dict[str, dict[str, Any]]:
        """The retain-only models that are known: key -> {"path", "result"}, or {"error"} where there is none."""
        mount.fetch(self.references_path)
        return self._json(self.references_path)

    def search_state(self) -> dict[str, Any]:
        """What search.json holds (`launch.proposals.write_search`); empty where no search has begun."""
        mount.fetch(self.search_path)
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

    def _json(self, path: Path) -> dict[str, Any]:
        """The content of a file of ours that is replaced whole; empty where there is none."""
        for _ in range(_READ_ATTEMPTS):
            try:
                stamp = _stamp(path)
                known = self._read.get(path)
                if known is not None and known[0] == stamp:
                    return known[1]
                value = files.read_json(path, pairs=_interned)
                if _stamp(path) == stamp:
                    self._read[path] = (stamp, value)
                    return value
            except (FileNotFoundError, NotADirectoryError):
                break  # a resumed trial has just taken it away
            except CorruptError:
                if _stamp_or_none(path) == stamp:
                    break
        self._read.pop(path, None)
        return {}

    def _reference_keys(self) -> dict[str, str | None]:
        """Which retain-only model a trial is compared with, as the plan says."""
        if self._keys is None:
            trials = files.read_json(self.plan_path)["trials"]
            self._keys = {trial["trial_id"]: trial.get("reference") for trial in trials}
        return self._keys

    @contextmanager
    def lease(self, part: str | None = None, *, say: Callable[[str], None] | None = None) -> Iterator[Lease]:
        """Hold the folder while the sweep runs; a process that dies loses it.

        Args:
            part: the share of the sweep that is run, such as "1-of-4"; other shares may be run at the same time. Default: all.
            say: told when another machine's heartbeat has to be watched, which takes up to 15 s.

        Raises:
            LeaseError: another process holds it, or the same share of it, or (where all is wanted) any share, or all.
        """
        with Lease(self.path, _LEASE if part is None else f"{_PART_LEASE}{part}", say=say) as lease:
            # Taken first and asked then: of two that do so at the same time, at least one sees the other.
            for name in [_LEASE] if part is not None else self._part_leases():
                if (holder := holder_of(self.path, name, say=say)) is not None:
                    what = "" if part is not None else f" as part {name.removeprefix(_PART_LEASE).replace('-of-', '/')}"
                    raise LeaseError(
                        f"{mount.shown(self.path)} is in use by {holder}{what}; wait for it, stop it, or choose another --name"
                    )
            yield lease

    def _part_leases(self) -> list[str]:
        store = mount.store_of(self.path)
        if store is None:
            names = os.listdir(self.path)
        else:
            names = [found.rpartition("/")[2] for found in store[0].glob(f"{store[1]}/{_PART_LEASE}*")]
        return sorted({name.rpartition(".")[0] for name in names if name.startswith(_PART_LEASE)})


def trial_lock(folder: Path, *, patience_s: float = TRIAL_PATIENCE_S, say: Callable[[str], None] | None = None) -> Lease:
    """The lease of a trial's folder, to hold while it trains; `check` it before writing.

    After a `kill -9` of a sweep its workers live for a second or two, and after a cut of the network for longer. A resumed sweep
    waits for the lease until they are gone, so two processes never write one trial. Entering it raises a LeaseError where another
    process still has it after `patience_s` seconds.
    """
    return Lease(folder, patience_s=patience_s, say=say)


def find_sweep(root: Path, name: str) -> SweepFolder:
    """Find a sweep to resume by "<sweep>" or "<task>/<sweep>".

    Raises:
        ConfigError: no such sweep, one in several tasks, or one in a folder of another user.
    """
    results = root / "results"
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
    if not folder.path.exists():
        return
    name = folder.path.name
    if not folder.plan_path.exists():
        if any(not entry.name.startswith(_LEASE) for entry in folder.path.iterdir()):
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


def _interned(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict whose keys are shared with all others: a thousand rows have the same hundred."""
    return {sys.intern(key): value for key, value in pairs}


def _stamp(path: Path) -> _Stamp:
    """What a file that is replaced whole has another of."""
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size


def _stamp_or_none(path: Path) -> _Stamp | None:
    try:
        return _stamp(path)
    except OSError:
        return None


def _is_row(name: str) -> bool:
    return name.endswith("/row.json")
