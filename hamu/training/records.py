"""What a run records: a row an evaluation or logged step, a row a trial; in Parquet files that are complete when seen.

Files of a trial in the records folder:
    <trial_id>-00000.parquet, -00001 ...   parts while it runs, one a flush, never changed once there
    <trial_id>.parquet                     the same rows in one file once it has ended, one row group a part
    .<name>.<process>.tmp                  a file being written; `os.replace` gives it its name
    <name>.corrupt-<n>                     a file that was broken and has been set aside; nobody reads it

A reader takes the one file where it exists and the parts otherwise, so a process killed between writing the one and
removing the others counts nothing twice. A run that resumes calls `Recorder.truncate` with the number of parts that its
checkpoint knew of (0 without a checkpoint), so no step is recorded twice either. All this holds for killed processes;
nothing is fsync'd, so a power cut may cost the newest files. Every file carries checksums (`hamu.storage.parquet`): one that is
broken is named by a CorruptError, and `Recorder.start_anew` sets it aside so that its trial can run again.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from hamu.errors import ConfigError, CorruptError, DataError, unknown
from hamu.storage import mount
from hamu.storage.files import replacing, set_aside
from hamu.storage.parquet import check_parquet, open_parquet, write_parquet
from hamu.training.record_columns import (
    HARDNESS_COLUMNS,
    IDENTITY_FIELDS,
    METRIC_COLUMNS,
    RECORD_SCHEMA,
    SPLITS,
    STEP_COLUMNS,
    TRIAL_SCHEMA,
)

__all__ = [
    "HARDNESS_COLUMNS",
    "IDENTITY_FIELDS",
    "METRIC_COLUMNS",
    "RECORD_SCHEMA",
    "SPLITS",
    "STEP_COLUMNS",
    "TRIAL_SCHEMA",
    "Recorder",
    "read_records",
    "read_trials",
    "replacing",
    "write_trials",
]

logger = logging.getLogger(__name__)

_PART = re.compile(r"(?P<trial>.+)-(?P<part>\d{5})\.parquet")
_TRIAL_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*")
_MAX_PARTS = 100_000
_READ_ATTEMPTS = 100


class Recorder:
    """Collects the rows of one trial and writes them as part files, then as one file.

    Args:
        folder: the records folder, shared by all trials of a sweep; made when missing. One recorder a trial at a time.
        identity: columns that every row of the trial carries; `trial_id` is required (it names the files).
        wait: told while the storage is full, as in `files.patiently`.

    Raises:
        ConfigError: an unknown column, or a trial id that cannot name a file.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, wait: Callable[[str], None] | None = None) -> None:
        self.folder = Path(folder)
        self.identity = dict(identity)
        _check_columns(self.identity, RECORD_SCHEMA)
        self.trial_id = str(self.identity.get("trial_id") or "")
        if not _TRIAL_ID.fullmatch(self.trial_id) or _PART.fullmatch(f"{self.trial_id}.parquet"):
            raise ConfigError(
                f"trial_id {self.trial_id!r} cannot name record files; use letters, digits, '_', '.' and '-', "
                "and do not end in '-' and five digits"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._wait = wait
        self._rows: list[dict[str, Any]] = []
        mount.fetch(self.folder, only=lambda name: _trial_of(name) == self.trial_id)
        self._next_part = self._count_parts()

    @property
    def n_parts(self) -> int:
        """Number of parts on disk; what a checkpoint keeps (flush first) and `truncate` takes on resume."""
        return self._next_part

    @property
    def path(self) -> Path:
        """The one file of the ended trial."""
        return self.folder / f"{self.trial_id}.parquet"

    def log(self, row: Mapping[str, Any]) -> None:
        """Keep one row (plain Python or numpy scalars, copied) until the next flush; about a microsecond.

        Raises:
            ConfigError: the row has a column that RECORD_SCHEMA lacks.
        """
        if not row.keys() <= _RECORD_NAMES:
            _check_columns(row, RECORD_SCHEMA)
        self._rows.append(dict(row))

    def flush(self) -> None:
        """Write the rows logged since the last flush as one more part; no rows, no part."""
        if not self._rows:
            return
        if self._next_part >= _MAX_PARTS:
            raise DataError(f"trial {self.trial_id!r} has {_MAX_PARTS} record parts; flush less often")
        if self.path.exists():  # the trial had ended and goes on: as long as this file is there, parts are not read
            self._cut(self._next_part)
        rows = [{**row, **self.identity} for row in self._rows]
        write_parquet(self._part(self._next_part), [pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)], wait=self._wait)
        self._next_part += 1
        self._rows.clear()

    def truncate(self, n_parts: int) -> None:
        """Keep the first `n_parts` parts and forget everything later, pending rows included; undoes `finish` too.

        Raises:
            CorruptError: one of those parts is broken or missing; the trial can `start_anew`.
        """
        if n_parts and self.path.exists():
            check_parquet(self.path)
        if not 0 <= n_parts <= self._next_part:
            raise CorruptError(
                self.path if self.path.exists() else self._part(self._next_part),
                f"the checkpoint of trial {self.trial_id!r} knows {n_parts} record parts, {mount.shown(self.folder)} holds "
                f"{self._next_part}",
            )
        if not self.path.exists():
            for part in range(n_parts):
                self._read_part(part)
        self._rows.clear()
        self._cut(n_parts)

    def start_anew(self) -> None:
        """Forget all of the trial's records, pending rows included; files that are broken are set aside, not removed."""
        self._rows.clear()
        self._cut(0)

    def _cut(self, n_parts: int) -> None:
        if n_parts and self.path.exists():
            with open_parquet(self.path) as compacted:
                for part in range(n_parts):
                    write_parquet(self._part(part), [compacted.read_row_group(part)], wait=self._wait)
        for part in reversed(self._parts_on_disk()):  # from the end, so that a kill in here leaves no gap
            if part >= n_parts:
                _drop(self._part(part))
        _drop(self.path)  # last: until here a reader took this file, from here on the parts
        for leftover in self.folder.glob(".*.tmp"):  # of a process killed while writing this trial's file
            if _trial_of(leftover.name[1:].rsplit(".", 2)[0]) == self.trial_id:
                leftover.unlink(missing_ok=True)
        self._next_part = n_parts

    def finish(self) -> None:
        """Flush, then put all parts into one file, one row group each; calling it again changes nothing.

        Raises:
            CorruptError: a part is broken or missing.
        """
        self.flush()
        left = self._parts_on_disk()
        if left and self.path.exists():
            check_parquet(self.path)  # before the parts go
        if not self.path.exists() and self._next_part:
            parts = [_with_columns(self._read_part(part), RECORD_SCHEMA) for part in range(self._next_part)]
            write_parquet(self.path, parts, wait=self._wait)
        for part in self._parts_on_disk():
            mount.remove(self._part(part))

    def _read_part(self, part: int) -> pa.Table:
        try:
            return _read_parquet(self._part(part))
        except FileNotFoundError:
            raise CorruptError(self._part(part), "it is missing") from None

    def _part(self, part: int) -> Path:
        return self.folder / f"{self.trial_id}-{part:05d}.parquet"

    def _parts_on_disk(self) -> list[int]:
        names = (_PART.fullmatch(name) for name in os.listdir(self.folder))
        return sorted(int(match["part"]) for match in names if match and match["trial"] == self.trial_id)

    def _count_parts(self) -> int:
        if self.path.exists():
            try:
                with open_parquet(self.path) as compacted:
                    return compacted.num_row_groups
            except CorruptError:
                return 0  # which is said when it is to be read, and no reason not to start anew
        return max(self._parts_on_disk(), default=-1) + 1


def read_records(folder: Path) -> pa.Table:
    """Read all rows recorded so far, each once, by trial and in the order logged, while trials write, end or resume.

    Returns:
        A table of RECORD_SCHEMA; a column that an older file lacks is null. Empty when nothing is recorded yet.

    Raises:
        DataError: the folder does not exist.
        CorruptError: a file in it is no Parquet file, or not as it was written.
    """
    folder = Path(folder)
    mount.fetch(folder)
    for attempt in range(_READ_ATTEMPTS):
        before = _snapshot(folder)
        chosen = _without_compacted_parts(before)
        try:
            tables = [_with_columns(_read_parquet(folder / name), RECORD_SCHEMA) for name in chosen]
        except FileNotFoundError:
            tables = None
        after = _snapshot(folder)
        # Files that vanish or change, or a trial compacted meanwhile, may have been seen in between: look again.
        ended_meanwhile = any(name not in before and not _PART.fullmatch(name) for name in after)
        if tables is not None and not ended_meanwhile and all(after.get(name) == before[name] for name in chosen):
            return pa.concat_tables([RECORD_SCHEMA.empty_table(), *tables])
        time.sleep(0.002 * min(attempt, 10))
    raise DataError(f"the records in {folder} changed during each of {_READ_ATTEMPTS} readings; read them again later")


def write_trials(path: Path, rows: Iterable[Mapping[str, Any]], *, wait: Callable[[str], None] | None = None) -> None:
    """Write one row a trial as `path`, replacing it whole; missing keys are null. wait: as in `files.patiently`.

    Raises:
        ConfigError: a row has a key that TRIAL_SCHEMA lacks.
    """
    kept = [dict(row) for row in rows]
    for row in kept:
        _check_columns(row, TRIAL_SCHEMA)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, [pa.Table.from_pylist(kept, schema=TRIAL_SCHEMA)], wait=wait)


def read_trials(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a trials.parquet as dicts with every column of TRIAL_SCHEMA (null: None).

    Raises:
        DataError: the file does not exist.
        CorruptError: it is no Parquet file, or not as it was written.
    """
    mount.fetch(Path(path))
    try:
        return _with_columns(_read_parquet(Path(path)), TRIAL_SCHEMA).to_pylist()
    except FileNotFoundError:
        raise DataError(f"no trials at {path}; a results folder holds trials.parquet once a sweep has run") from None


_RECORD_NAMES = frozenset(RECORD_SCHEMA.names)


def _check_columns(row: Mapping[str, Any], schema: pa.Schema) -> None:
    names = frozenset(schema.names)  # which pyarrow makes anew each time
    for name in row:
        if name not in names:
            raise ConfigError(unknown("record column", name, schema.names))


def _trial_of(name: str) -> str:
    match = _PART.fullmatch(name)
    return match["trial"] if match else name.removesuffix(".parquet")


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Visible Parquet files of a folder: name -> (inode, time of change), to tell a rewritten file from the old."""
    files: dict[str, tuple[int, int]] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(".parquet") and not entry.name.startswith("."):
                    try:
                        stat = os.stat(entry.path)
                    except FileNotFoundError:
                        # Gone since it was listed, and what took its place may not have been: reading it fails, and that
                        # makes the reader look again.
                        files[entry.name] = (-1, -1)
                        continue
                    files[entry.name] = (stat.st_ino, stat.st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"no records folder at {folder}; give the records/ folder of a sweep's results") from None
    return files


def _without_compacted_parts(names: Iterable[str]) -> list[str]:
    """The files to read, sorted: all but the parts of trials whose one file is there."""
    ended = {name.removesuffix(".parquet") for name in names if not _PART.fullmatch(name)}
    return sorted(name for name in names if not _PART.fullmatch(name) or _trial_of(name) not in ended)


def _read_parquet(path: Path) -> pa.Table:
    with open_parquet(path) as file:
        return file.read()


def _drop(path: Path) -> None:
    """Remove a file; one that is broken is set aside for the user to look at."""
    try:
        check_parquet(path)
    except FileNotFoundError:
        return
    except CorruptError as error:
        logger.warning("%s; it lies at %s now", error, set_aside(path).name)
        return
    mount.remove(path)


def _with_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table in the schema's columns: missing ones null, others dropped, types cast."""
    if table.schema.equals(schema):  # as of every file of this version
        return table
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
