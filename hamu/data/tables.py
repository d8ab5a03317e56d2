"""Tables of rows as Arrow columns: of a local folder (parquet files, or the form of `save_to_disk`) or a hub dataset.

Local files are read directly. `datasets.load_dataset` caches a folder by its last name and a README's `configs:` block,
so that two folders of one name could be served each other's rows.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hamu.errors import DataError
from hamu.hub import offline, one_line, why_not_on_hub

_SPLIT_NAMES = "train|test|validation|valid|val|dev|eval"
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
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
    """Where the rows come from: kind ("folder" or "hub"), name, subset, split, files."""

    def column(self, given: str | None, candidates: tuple[str, ...], flag: str) -> str:
        """Return the column to read: the one that was named, else the first candidate that exists.

        Raises:
            DataError: there is no such column.
        """
        for column in (given,) if given else candidates:
            if column in self.schema.names:
                return column
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


def open_table(name: str, split: str, *, subset: str | None = None, cache_dir: str | None = None) -> OpenTable:
    """Open a split of a local folder, or of a dataset on the hub or in its cache.

    Args:
        name: path of a folder that exists, or `owner/name` on the hub.
        split: name of the split, such as "train".
        subset: configuration: a folder inside the local folder, or the hub dataset's.
        cache_dir: of hub datasets; None is the library's own.

    Raises:
        DataError: there is no such dataset, subset or split, or its files cannot be read.
    """
    if os.path.isdir(os.path.expanduser(name)):
        return _open_folder(Path(name).expanduser(), split, subset)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise DataError(
            f"no dataset {name!r}: it is not an existing folder; give one, or digits, cifar10, or a hub name owner/name"
        )
    return _open_hub(name, split, subset, cache_dir)


def _open_folder(folder: Path, split: str, subset: str | None) -> OpenTable:
    root = folder / subset if subset else folder
    if not root.is_dir():
        have = ", ".join(sorted(entry.name for entry in folder.iterdir() if entry.is_dir())) or "none"
        raise DataError(f"dataset {str(folder)!r} has no subset {subset!r}; its folders are: {have}")
    try:
        splits, read_file, read_schema = _splits_of(root)
    except _READ_ERRORS as error:
        raise DataError(f"cannot read dataset {str(root)!r} ({one_line(error)}); save it again") from error
    if not splits:
        raise DataError(
            f"dataset {str(root)!r} holds no .parquet files and is not in the form of save_to_disk; "
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

    def read(columns: list[str]) -> pa.Table:
        try:
            return pa.concat_tables([read_file(file, columns) for file in files])
        except _READ_ERRORS as error:
            raise DataError(f"cannot read dataset {str(root)!r} ({one_line(error)}); save it again") from error

    try:
        schema = read_schema(files[0])
    except _READ_ERRORS as error:
        raise DataError(f"cannot read {str(files[0])!r} ({one_line(error)}); save it again") from error
    source = {
        "kind": "folder", "name": str(folder.resolve()), "subset": subset, "split": split,
        "files": [file.relative_to(folder).as_posix() for file in files],
    }  # fmt: skip
    return OpenTable(name=f"dataset {str(folder)!r}, split {split!r},", schema=schema, read=read, source=source)


_Reader = Callable[[Path, list[str] | None], pa.Table]


def _splits_of(root: Path) -> tuple[dict[str, list[Path]], _Reader, Callable[[Path], pa.Schema]]:
    """Files of each split, in row order, and how to read one."""
    if (root / "dataset_dict.json").is_file():
        names = json.loads((root / "dataset_dict.json").read_text())["splits"]
        return {name: _saved_files(root / name) for name in names}, _read_arrow, lambda f: _read_arrow(f, None).schema
    if (root / "state.json").is_file():
        name = json.loads((root / "state.json").read_text()).get("_split") or "train"
        return {name: _saved_files(root)}, _read_arrow, lambda file: _read_arrow(file, None).schema
    splits: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*.parquet")):
        if not any(part.startswith(".") for part in file.relative_to(root).parts):
            splits.setdefault(_split_name(file, root), []).append(file)
    return splits, lambda file, columns: pq.ParquetFile(file).read(columns), pq.read_schema


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


def _open_hub(name: str, split: str, subset: str | None, cache_dir: str | None) -> OpenTable:
    import datasets

    reason = why_not_on_hub(name, "dataset")
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if reason is None:
            rows = datasets.load_dataset(name, subset, split=split, cache_dir=cache_dir)
        else:
            with offline():  # from the cache, if it is there
                rows = datasets.load_dataset(name, subset, split=split, cache_dir=cache_dir)
    except Exception as error:  # whatever the library raises, the user's mend is the same
        raise DataError(
            f"cannot load dataset {name!r}, split {split!r} ({reason or one_line(error)}); check the name and the "
            "split, fetch it once where there is a network, or give a local folder"
        ) from error
    finally:
        if not bars:
            datasets.enable_progress_bars()
    table = rows.data.table if rows._indices is None else rows.flatten_indices().data.table
    schema = rows.features.arrow_schema  # states the classes' names
    source = {"kind": "hub", "name": name, "subset": subset, "split": split, "fingerprint": rows._fingerprint}
    return OpenTable(name=f"dataset {name!r}, split {split!r},", schema=schema, read=table.select, source=source)
