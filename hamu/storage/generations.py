"""The files of a lease, in a folder or in a store: created by one process only, read, beaten, released and removed.

Both kinds have the same functions. A generation counts from 1; `create` says whether this process made the file; `read` gives its
text and a stamp that changes with every beat, or None where it is not there.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from typing import Any


def create_in_store(store: Any, name: str, content: bytes) -> bool:
    """Put a file into a store of fsspec unless there is one of its name. Returns whether it is this one that is there."""
    try:
        store.pipe_file(name, content, mode="create")
    except FileExistsError:
        # Perhaps by this very call, where its answer was lost and the library asked again.
        try:
            return store.cat_file(name) == content
        except FileNotFoundError:
            return False
    except OSError as error:
        if "ConditionalRequestConflict" in repr(error.__cause__):  # S3's answer to two at the same moment
            return False
        raise
    return True


class LocalGenerations:
    """On a file system, which NFS is too: `open` with O_EXCL, and a beat is a new time of change."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = str(folder), name
        self._prefix = f"{name}."

    def listed(self) -> list[int]:
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        start = len(self._prefix)
        return [int(name[start:]) for name in names if name.startswith(self._prefix) and name[start:].isdecimal()]

    def create(self, generation: int, text: str) -> bool:
        try:
            file = os.open(self._path(generation), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(file, text.encode())
        except OSError:  # such as no space: a lease that says nothing would only look like a slow one
            self.remove(generation)
            raise
        finally:
            os.close(file)
        return True

    def read(self, generation: int) -> tuple[str, object] | None:
        # Opened, not only asked for its time: an NFS client asks the server anew at an open.
        try:
            with open(self._path(generation), encoding="utf-8", errors="replace") as file:
                return file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def is_last(self, generation: int, text: str) -> bool:
        if os.path.exists(self._path(generation + 1)):
            return False
        found = self.read(generation)
        return found is not None and found[0] == text

    def beat(self, generation: int, text: str) -> None:
        os.utime(self._path(generation))

    def release(self, generation: int, word: str) -> None:
        file = os.open(self._path(generation), os.O_WRONLY)
        try:
            os.pwrite(file, f"{word}\n".encode(), 0)  # the rest of the line stays, so that this is one write
        finally:
            os.close(file)

    def remove(self, generation: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(generation))

    def _path(self, generation: int) -> str:
        return f"{self._folder}/{self._prefix}{generation}"


class StoreGenerations:
    """In an object store of fsspec: a conditional put, and a beat writes the text again with another number behind it."""

    def __init__(self, store: Any, folder: str, name: str) -> None:
        self._store, self._folder, self._name = store, folder, name

    def listed(self) -> list[int]:
        self._store.invalidate_cache()
        try:
            found = self._store.glob(f"{self._folder}/{self._name}.*")
        except FileNotFoundError:
            return []
        matches = (re.fullmatch(rf"{re.escape(self._name)}\.(\d+)", path.rpartition("/")[2]) for path in found)
        return [int(match[1]) for match in matches if match]

    def create(self, generation: int, text: str) -> bool:
        return create_in_store(self._store, self._path(generation), text.encode())

    def read(self, generation: int) -> tuple[str, object] | None:
        try:
            text = self._store.cat_file(self._path(generation)).decode(errors="replace")
        except FileNotFoundError:
            return None
        said, _, beat = text.partition("\n")
        return said, beat

    def is_last(self, generation: int, text: str) -> bool:
        found = self.read(generation)
        return found is not None and found[0] == text and self.read(generation + 1) is None

    def beat(self, generation: int, text: str) -> None:
        self._store.pipe_file(self._path(generation), f"{text}\n{time.time_ns()}".encode())

    def release(self, generation: int, word: str) -> None:
        self._store.pipe_file(self._path(generation), word.encode())

    def remove(self, generation: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._store.rm_file(self._path(generation))

    def _path(self, generation: int) -> str:
        return f"{self._folder}/{self._name}.{generation}"
