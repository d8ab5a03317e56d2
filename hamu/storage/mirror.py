"""One store's local mirror: which versions of its files are here, what has to be fetched, and what has to be put.

For a mirrored file there is one of the same name in a folder of versions beside the mirror: the store's version of it (its ETag),
and the state of the local file that it is of (inode, time of change, size). So all processes of a machine know what the others
fetched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hamu.storage.temporary import temporary_for

LAST = ("record.json", "row.json")  # say that the other files of a folder are there

_ATTEMPTS = 5


class Mirror:
    """A folder of a store and the local folder that mirrors it.

    Args:
        store: an fsspec file system.
        root: of the folder in the store, without a protocol.
        folder: the local one.
        versions: where to note what the local files are.
    """

    def __init__(self, store: Any, root: str, folder: Path, *, versions: Path) -> None:
        self.store, self.folder = store, folder
        self._root, self._versions = root, versions
        self._known: dict[str, tuple[str, str]] = {}  # what versions/ says, as far as this process has seen it

    def remote(self, name: str) -> str:
        """A file's name in the store."""
        return f"{self._root}/{name}" if name else self._root

    def fetch(self, name: str, only: Callable[[str], bool] | None) -> None:
        """Bring a file or a folder up to date with the store."""
        for attempt in range(_ATTEMPTS):
            there = self._listed(name, only)
            wanted = [each for each, version in there.items() if not self._has(each, version)]
            for each in self._local_files(name, only):
                if each not in there and self._is_of_store(each):
                    (self.folder / each).unlink(missing_ok=True)
            try:
                self._get({each: there[each] for each in wanted})
                return
            except FileNotFoundError:  # gone since it was listed
                if attempt == _ATTEMPTS - 1:
                    raise

    def exists(self, name: str) -> bool:
        """Whether the store has a file or a folder of a name, now."""
        self.store.invalidate_cache(_above(self.remote(name)))
        return bool(self.store.exists(self.remote(name)))

    def listed(self, name: str) -> list[str]:
        """Names directly in a folder of the store, hidden ones too."""
        remote = self.remote(name)
        self.store.invalidate_cache(remote)
        try:
            found = self.store.ls(remote, detail=False)
        except FileNotFoundError:
            return []
        return sorted({path.rstrip("/").rpartition("/")[2] for path in found} - {"", remote.rpartition("/")[2]})

    def publish(self, name: str) -> None:
        """Bring the store up to date with a file or a folder."""
        here = self._local_files(name, None)
        there = self._listed(name, None)
        changed = [each for each in here if not (each in there and self._has(each, there[each]) and self._is_of_store(each))]
        # Not here, but it was: what another machine has put there, and nobody here has seen, is left alone.
        gone = [each for each in there if each not in set(here) and self._noted(each, there[each])[0] == there[each]]
        says_done = [each for each in there if each.rpartition("/")[2] in LAST and each != name]
        stale = {each for each in says_done if any(_is_beside(each, other) for other in (*changed, *gone))}
        for each in sorted({*gone, *stale}, key=lambda each: each not in stale):
            self._delete(each)
        changed = sorted({*changed, *(stale & set(here))}, key=lambda each: each.rpartition("/")[2] in LAST)
        ends = [each for each in changed if each.rpartition("/")[2] in LAST]
        for group in ([each for each in changed if each not in ends], ends):
            self.put([(self.folder / each, each) for each in group])
            self.note(group)

    def put(self, files: Sequence[tuple[Path, str]]) -> None:
        """Upload local files under names of the store."""
        if len(files) == 1:  # a single call, and an error of its own kind
            self.store.put_file(str(files[0][0]), self.remote(files[0][1]))
        elif files:
            self.store.put([str(path) for path, _ in files], [self.remote(name) for _, name in files])

    def note(self, names: Sequence[str]) -> None:
        """Remember that local files are what the store has now."""
        for name in names:
            self.store.invalidate_cache(_above(self.remote(name)))
            try:
                version = _version(self.store.info(self.remote(name)))
                self._remember(name, version, _stamp(self.folder / name))
            except FileNotFoundError:
                self._forget(name)

    def remove(self, name: str) -> None:
        """Remove a file or a folder from the store; the caller removes it here."""
        with contextlib.suppress(FileNotFoundError):
            self.store.rm(self.remote(name), recursive=True)
        self.store.invalidate_cache(_above(self.remote(name)))
        self._forget(name)
        shutil.rmtree(self._versions / name, ignore_errors=True)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.store.rm_file(self.remote(name))
        self._forget(name)

    def _listed(self, name: str, only: Callable[[str], bool] | None) -> dict[str, str]:
        """Files of the store at a name: name -> version."""
        remote = self.remote(name)
        self.store.invalidate_cache(remote)
        self.store.invalidate_cache(_above(remote))
        try:
            entries = self.store.find(remote, detail=True)
        except FileNotFoundError:
            return {}
        names = {path[len(self._root) + 1 :]: entry for path, entry in entries.items() if entry.get("type") != "directory"}
        return {each: _version(entry) for each, entry in names.items() if _is_wanted(each, name, only)}

    def _local_files(self, name: str, only: Callable[[str], bool] | None) -> list[str]:
        path = self.folder / name
        if not path.is_dir():
            return [name] if path.exists() else []
        found = []
        for folder, folders, files in os.walk(path):
            folders[:] = [each for each in folders if not each.startswith(".")]
            inside = os.path.relpath(folder, self.folder)
            found += [each if inside == "." else f"{inside}/{each}" for each in files]
        return [each for each in found if _is_wanted(each, name, only)]

    def _get(self, wanted: dict[str, str]) -> None:
        """Download files, each whole when it has its name."""
        if not wanted:
            return
        temporaries = {}
        for name in wanted:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporaries[name] = temporary_for(path)
        try:
            names = list(wanted)
            if len(names) == 1:
                self.store.get_file(self.remote(names[0]), str(temporaries[names[0]]))
            else:
                self.store.get([self.remote(name) for name in names], [str(temporaries[name]) for name in names])
            for name in names:
                stamp = _stamp(temporaries[name])
                os.replace(temporaries[name], self.folder / name)
                self._remember(name, wanted[name], stamp)
        finally:
            for temporary in temporaries.values():
                temporary.unlink(missing_ok=True)

    def _has(self, name: str, version: str) -> bool:
        """Whether the mirror has this version, or one that was made of it here and not published yet."""
        return (self.folder / name).exists() and self._noted(name, version)[0] == version

    def _is_of_store(self, name: str) -> bool:
        try:
            return self._noted(name, None)[1] == _stamp(self.folder / name)
        except FileNotFoundError:
            return False

    def _noted(self, name: str, version: str | None) -> tuple[str, str]:
        """Version and local stamp that were noted last; read again unless this process knows the version asked for."""
        known = self._known.get(name)
        if known is not None and known[0] == version:
            return known
        try:
            noted, _, stamp = (self._versions / name).read_text().partition("\n")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            self._known.pop(name, None)
            return "", ""
        self._known[name] = noted, stamp
        return noted, stamp

    def _remember(self, name: str, version: str, stamp: str) -> None:
        note = self._versions / name
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_for(note)
        temporary.write_text(f"{version}\n{stamp}")
        os.replace(temporary, note)
        self._known[name] = version, stamp

    def _forget(self, name: str) -> None:
        self._known.pop(name, None)
        with contextlib.suppress(OSError):
            (self._versions / name).unlink(missing_ok=True)


def _is_wanted(each: str, asked: str, only: Callable[[str], bool] | None) -> bool:
    inside = each[len(asked) :].lstrip("/") if asked else each
    if any(part.startswith(".") for part in inside.split("/")):
        return False
    return only is None or not inside or only(inside)


def _is_beside(end: str, other: str) -> bool:
    """Whether `other` is one of the files that a record.json or row.json vouches for: of its own folder."""
    return end != other and _above(end) == _above(other)


def _above(name: str) -> str:
    return name.rpartition("/")[0]


def _version(entry: dict[str, Any]) -> str:
    """What changes with a file of a store; one line."""
    for key in ("ETag", "etag", "generation", "md5Hash", "content_md5"):
        if entry.get(key):
            return str(entry[key])
    changed = entry.get("LastModified") or entry.get("last_modified") or entry.get("created") or entry.get("mtime")
    return f"{entry.get('size')} {changed}"


def _stamp(path: Path) -> str:
    found = os.stat(path)
    return f"{found.st_ino} {found.st_mtime_ns} {found.st_size}"
