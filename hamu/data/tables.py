"""Tables of rows as Arrow columns: of a local folder (parquet or JSON files, or the form of `save_to_disk`), a single file,
or a hub dataset.

Local files are read directly. `datasets.load_dataset` caches a folder by its last name and a README's `configs:` block,
so that two folders of one name could be served each other's rows.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hamu.errors import DataError
from hamu.hub import offline, one_line, rows_in_cache, why_not_on_hub

_SPLIT_NAMES = "train|test|validation|valid|val|dev|eval"
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_FILE_TYPES = (".json", ".jsonl", ".parquet")
_NOT_ROWS = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
_READ_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True, kw_only=True)
class OpenTable:
    """A split whose columns are known and whose rows are not read yet."""

    name: str
    """Dataset and split, as messages call it."""
    schema: pa.Schema
    read: Callable[[list[str]], pa.Table]
    """Read the named columns of all rows."""
    source: dict[str, Any]
    """Where the rows come from: kind ("folder", "file" or "hub"), name, subset, split, files, revision (of the hub)."""

    def column(self, given: str | None, candidates: tuple[str, ...], flag: str) -> str:
        """Return the column to read: the one that was named, else the first candidate that exists.

        Raises:
            DataError: there is no such column.
        """
        for column in (given,) if given else candidates:
            if column in self.schema.names:
                return column
        if not self.schema.names:
            raise DataError(f"{self.name} is empty; give a file that has rows")
        wanted = repr(given) if given else " or ".join(map(repr, candidates))
        raise DataError(
            f"{self.name} has no column {wanted}; it has {', '.join(self.schema.names)}: name one of them with --{flag}"
        )

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Return the names of a label column's classes, where the dataset states them."""
        try:
            metadata = json.loads((self.schema.metadata or {})[b"huggingface"])
            return tuple(metadata["info"]["features"][column]["names"])
        except (KeyError, TypeError, ValueError):
            return None


def open_table(
    name: str, split: str, *, subset: str | None = None, cache_dir: str | None = None, revision: str | None = None
) -> OpenTable:
    """Open a split of a local folder or file, or of a dataset on the hub or in its cache.

    JSON files hold one object a line, or one list of objects. The one split of a single file is "train".

    Args:
        name: path of a folder or of a .json, .jsonl or .parquet file that exists, or `owner/name` on the hub.
        split: name of the split, such as "train".
        subset: configuration: in a local folder a folder of that name, at any depth, or a file `<subset>.json`, `.jsonl` or
            `.parquet`; or the hub dataset's.
        cache_dir: of hub datasets; None is the library's own.
        revision: commit, tag or branch of a hub dataset; None is main. Local data have none.

    Raises:
        DataError: there is no such dataset, subset or split, or its files cannot be read.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(path, split, subset)
    if path.is_file():
        return _open_file(path, split, subset)
    if not is_hub_name(name):
        raise DataError(
            f"no dataset {name!r}: it is not an existing folder or {', '.join(_FILE_TYPES)} file; give one, or digits or cifar10 "
            "(images), authors or tofu (text), or a hub name owner/name"
        )
    return _open_hub(name, split, subset, cache_dir, revision)


def is_hub_name(name: str) -> bool:
    """Whether a name can only mean a dataset on the hub: `owner/name`, and no such folder or file is here."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith((*_FILE_TYPES, "/")):
        return False
    return not os.path.exists(name)


def subsets_of(folder: Path) -> tuple[list[str], list[str]]:
    """Return what a local folder offers as subsets: names of folders that hold rows, and of files directly in it.

    The folders are named without the path to them; those of splits of the form of `save_to_disk` are not among them.
    """
    folders = {file.parent.name for file in _row_files(folder, ("*.parquet", "*.json", "*.jsonl")) if file.parent != folder}
    saved = [file.parent for name in ("dataset_dict.json", "state.json") for file in folder.rglob(name)]
    folders |= {place.name for place in saved if place != folder and not (place.parent / "dataset_dict.json").is_file()}
    files = {file.stem for file in folder.iterdir() if file.suffix in _FILE_TYPES and file.name not in _NOT_ROWS}
    return sorted(folders), sorted(files)


def _subset_place(folder: Path, subset: str) -> Path:
    """The folder or file of a subset: directly in the folder, else a folder of that name deeper inside."""
    if (folder / subset).is_dir():
        return folder / subset
    found = [file for suffix in _FILE_TYPES if (file := folder / f"{subset}{suffix}").is_file()]
    found = found or sorted(
        place
        for place in folder.rglob("*")
        if place.is_dir() and place.name == subset and not _is_hidden(place.relative_to(folder))
    )
    if not found:
        folders, files = (", ".join(names) or "none" for names in subsets_of(folder))
        raise DataError(f"dataset {str(folder)!r} has no subset {subset!r}; its folders are: {folders}; its files are: {files}")
    if len(found) > 1:
        places = ", ".join(place.relative_to(folder).as_posix() for place in found)
        raise DataError(f"dataset {str(folder)!r} has subset {subset!r} in {len(found)} places ({places}); keep one of them")
    return found[0]


def _open_folder(folder: Path, split: str, subset: str | None) -> OpenTable:
    root = _subset_place(folder, subset) if subset else folder
    if root.is_file():
        return _open_file(root, split, subset, folder=folder)
    try:
        splits, read_file, read_schema = _splits_of(root)
    except _READ_ERRORS as error:
        raise DataError(f"cannot read dataset {str(root)!r} ({one_line(error)}); save it again") from error
    if not splits:
        raise DataError(
            f"dataset {str(root)!r} holds no .parquet files, no .json or .jsonl files, and is not in the form of save_to_disk; "
            "give a folder that holds one of them"
        )
    if split not in splits:
        raise DataError(f"dataset {str(root)!r} has no split {split!r}; it has: {', '.join(sorted(splits))}")
    files = splits[split]
    subsets = {file.parent.relative_to(root).as_posix() for file in files}
    if len(subsets) > 1:
        raise DataError(
            f"dataset {str(root)!r} has split {split!r} in {len(subsets)} folders ({', '.join(sorted(subsets))}); "
            "name one with --dataset_subset"
        )
    source = {
        "kind": "folder", "name": str(folder.resolve()), "subset": subset, "split": split,
        "files": [file.relative_to(folder).as_posix() for file in files],
    }  # fmt: skip
    name = f"dataset {str(folder)!r}, {f'subset {subset!r}, ' if subset else ''}split {split!r},"
    return _table_of(name, files, read_file, read_schema, source)


def _open_file(file: Path, split: str, subset: str | None, *, folder: Path | None = None) -> OpenTable:
    """A file that was named itself, or as a subset of its folder."""
    if file.suffix not in _FILE_TYPES:
        raise DataError(f"dataset {str(file)!r} is a {file.suffix or 'plain'} file; give one of {', '.join(_FILE_TYPES)}")
    if subset and folder is None:
        raise DataError(f"dataset {str(file)!r} is one file and has no subset {subset!r}; leave the subset out")
    if split != "train":
        raise DataError(f"dataset {str(file)!r} is one file and has no split {split!r}; it has: train")
    source = {
        "kind": "file" if folder is None else "folder", "name": str((folder or file).resolve()), "subset": subset,
        "split": split, "files": [file.name],
    }  # fmt: skip
    return _table_of(f"dataset {str(file)!r}", [file], *_readers(file), source)


def _table_of(
    name: str, files: list[Path], read_file: _Reader, read_schema: Callable[[Path], pa.Schema], source: dict[str, Any]
) -> OpenTable:
    def read(columns: list[str]) -> pa.Table:
        try:
            tables = [read_file(file, columns) for file in files]
            return pa.concat_tables(tables, promote_options="default")  # a JSON file may hold nulls alone in a column
        except _READ_ERRORS as error:
            raise DataError(f"cannot read {name.rstrip(',')} ({one_line(error)}); save it again") from error

    try:
        schema = read_schema(files[0])
    except _READ_ERRORS as error:
        raise DataError(f"cannot read {str(files[0])!r} ({one_line(error)}); save it again") from error
    return OpenTable(name=name, schema=schema, read=read, source=source)


_Reader = Callable[[Path, list[str] | None], pa.Table]


def _splits_of(root: Path) -> tuple[dict[str, list[Path]], _Reader, Callable[[Path], pa.Schema]]:
    """Files of each split, in row order, and how to read one."""
    if (root / "dataset_dict.json").is_file():
        names = json.loads((root / "dataset_dict.json").read_text())["splits"]
        return {name: _saved_files(root / name) for name in names}, _read_arrow, lambda f: _read_arrow(f, None).schema
    if (root / "state.json").is_file():
        name = json.loads((root / "state.json").read_text()).get("_split") or "train"
        return {name: _saved_files(root)}, _read_arrow, lambda file: _read_arrow(file, None).schema
    files = list(_row_files(root, ("*.parquet",))) or list(_row_files(root, ("*.json", "*.jsonl")))
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_name(file, root), []).append(file)
    return splits, *_readers(files[0] if files else root)


def _row_files(root: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """Files at any depth that may hold rows, sorted; none of hidden folders."""
    for file in sorted(file for pattern in patterns for file in root.rglob(pattern)):
        if file.name not in _NOT_ROWS and not _is_hidden(file.relative_to(root)):
            yield file


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _readers(file: Path) -> tuple[_Reader, Callable[[Path], pa.Schema]]:
    """How to read a file of rows, and its schema alone."""
    if file.suffix in (".json", ".jsonl"):
        return _read_json, lambda file: _read_json(file, None).schema
    return lambda file, columns: pq.ParquetFile(file).read(columns), pq.read_schema


def _split_name(file: Path, root: Path) -> str:
    """The split of a parquet file: its name without the shard number, or its folder's where only that is a split's."""
    if match := re.match(rf"({_SPLIT_NAMES})([-_.]|$)", file.stem):
        return match[1]
    if file.parent != root and re.fullmatch(_SPLIT_NAMES, file.parent.name):
        return file.parent.name
    return _SHARD.sub("", file.stem)


def _saved_files(folder: Path) -> list[Path]:
    state = json.loads((folder / "state.json").read_text())
    return [folder / entry["filename"] for entry in state["_data_files"]]


def _read_arrow(file: Path, columns: list[str] | None) -> pa.Table:
    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_stream(source).read_all()
    return table if columns is None else table.select(columns)


def _read_json(file: Path, columns: list[str] | None) -> pa.Table:
    """Rows of a JSON file: one object a line, or one list of objects; a key that a row lacks is null."""
    rows = list(_json_rows(file.read_text(encoding="utf-8-sig")))
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is a {type(row).__name__}, not an object with named values")
    names = list(dict.fromkeys(key for row in rows for key in row)) if columns is None else columns
    arrays = []
    for name in names:
        try:
            arrays.append(pa.array([row.get(name) for row in rows]))
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"column {name!r}: {error}") from error
    return pa.table(arrays, names=names)


def _json_rows(text: str) -> Iterator[Any]:
    if text.lstrip().startswith("["):
        yield from json.loads(text)
        return
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a string may hold other line separators
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not a JSON object: {error.msg}") from error


def _open_hub(name: str, split: str, subset: str | None, cache_dir: str | None, revision: str | None) -> OpenTable:
    import datasets

    reason, at = why_not_on_hub(name, "dataset", revision), f", revision {revision!r}" if revision else ""
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if reason is None:
            rows = datasets.load_dataset(name, subset, split=split, cache_dir=cache_dir, revision=revision)
        else:  # from the cache, if it is there
            rows = rows_in_cache(name, subset, split, revision=revision, cache_dir=cache_dir)
            if rows is None:
                if revision is not None:  # the library would serve the rows cached last, of whatever revision
                    raise DataError(f"revision {revision!r} is not in the cache; {reason}")
                with offline():
                    rows = datasets.load_dataset(name, subset, split=split, cache_dir=cache_dir)
    except Exception as error:  # whatever the library raises, the user's mend is the same
        raise DataError(
            f"cannot load dataset {name!r}, split {split!r}{at} ({reason or one_line(error)}); check the name and the "
            "split, fetch it once where there is a network, or give a local folder"
        ) from error
    finally:
        if not bars:
            datasets.enable_progress_bars()
    table = rows.data.table if rows._indices is None else rows.flatten_indices().data.table
    schema = rows.features.arrow_schema  # states the classes' names
    source = {
        "kind": "hub", "name": name, "subset": subset, "split": split, "revision": revision, "fingerprint": rows._fingerprint,
    }  # fmt: skip
    return OpenTable(name=f"dataset {name!r}, split {split!r},", schema=schema, read=table.select, source=source)
