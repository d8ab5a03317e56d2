"""Files that are complete whenever they are there, and what is done about those that are broken or find no space.

A writer fills a temporary file and renames it; a reader checks what it reads and names a broken file, which is set aside under
another name, never deleted. Under a `mount` all of this happens in the store too. Nothing is fsync'd, so a power cut may cost
the newest files: their checksums tell.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hamu.errors import CorruptError
from hamu.storage import mount
from hamu.storage.generations import create_in_store
from hamu.storage.plain_json import checked_text, parsed
from hamu.storage.temporary import temporary_for

__all__ = [
    "CorruptError",
    "StorageFullError",
    "is_full",
    "on_wait",
    "patiently",
    "read_json",
    "replacing",
    "set_aside",
    "tell",
    "unwilling",
    "write_json",
    "write_new_json",
]

logger = logging.getLogger(__name__)

RETRY_S = 2.0
PATIENCE_S = 30 * 60.0

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "disk quota exceeded", "os error 28", "os error 122")

_Result = TypeVar("_Result")

_hooks: list[Callable[[str], None]] = []


class StorageFullError(Exception):
    """There is no space, and whoever writes does not wait for it."""


def on_wait(hook: Callable[[str], None] | None) -> None:
    """Have a function told, in this process, whenever a write waits for space without a `wait` of its own; None: nobody.

    It may raise, such as when a signal came meanwhile; the write is given up then.
    """
    _hooks[:] = [] if hook is None else [hook]


def unwilling(message: str) -> None:
    """A `wait` of `patiently` that does not wait.

    Raises:
        StorageFullError: always.
    """
    raise StorageFullError(message)


def tell(message: str) -> None:
    """Log a warning about the storage, and tell the hook of `on_wait`."""
    logger.warning(message)
    for hook in _hooks:
        hook(message)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path (dot-name, same folder) that becomes `path` after the block, or vanishes if it fails.

    Under a mount the store has the file before the folder has: another process here must not take the old one for newer.
    """
    temporary = temporary_for(path)
    try:
        yield temporary
        mount.upload(temporary, as_path=path)
        os.replace(temporary, path)
        mount.published(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, wait: Callable[[str], None] | None = None) -> None:
    """Write JSON at once, a dict with a checksum inside; numbers that JSON lacks (nan, infinity) become null.

    wait: as in `patiently`: where the storage is full, there is space to be waited for.
    """
    text = checked_text(value)

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    patiently(write, wait=wait, folder=path.parent)


def write_new_json(path: Path, value: Any, *, wait: Callable[[str], None] | None = None) -> bool:
    """As `write_json`, but never in the place of a file that is there, in the store too.

    Returns:
        Whether it was written: of several processes that do so at the same time, one is told that it was.
    """
    text = checked_text(value)
    return patiently(lambda: _create(path, text), wait=wait, folder=path.parent)


def _create(path: Path, text: str) -> bool:
    place = mount.store_of(path)
    if place is not None:
        is_made = create_in_store(*place, text.encode())
        mount.fetch(path)
        return is_made
    temporary = temporary_for(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return os.stat(temporary).st_nlink > 1  # by this very call, where a network folder's answer was lost
        except OSError as error:
            if is_full(error):
                raise
            return _create_in_place(path, text)  # a file system without links
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _create_in_place(path: Path, text: str) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def read_json(path: Path, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read what `write_json` wrote, without its checksum; JSON that has none is read as it is.

    Args:
        path: the file; under a mount the local copy (`mount.fetch` brings it up to date).
        pairs: makes a dict of its entries, as in `json.loads`.

    Raises:
        CorruptError: it is no JSON, or does not match its checksum.
        OSError: it is not there, or cannot be opened.
    """
    try:
        return parsed(path.read_bytes().decode("utf-8"), pairs=pairs)
    except ValueError as error:  # of the encoding, of JSON, of the checksum
        raise CorruptError(path, " ".join(str(error).split())[:120]) from None


def set_aside(path: Path) -> Path:
    """Give a broken file or folder the name "<name>.corrupt-<n>", in the store too, and return that; nothing is deleted."""
    n = 1
    while (aside := path.parent / f"{path.name}.corrupt-{n}").exists() or mount.exists(aside):
        n += 1
    os.rename(path, aside)
    mount.publish(aside)
    mount.remove(path)
    return aside


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, says that there is no space left (or none of the quota).

    The libraries that write tensors wrap the system's error, or only repeat its words.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(words in str(error) for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def patiently(
    write: Callable[[], _Result],
    *,
    wait: Callable[[str], None] | None = None,
    folder: Path | None = None,
    patience_s: float = PATIENCE_S,
) -> _Result:
    """Write, and where the storage is full wait until there is space: every 2 s it is tried again.

    Args:
        write: does it from the start, and leaves nothing behind when it fails (as a block of `replacing`).
        wait: told "<folder> is full (0 of N GiB free); waiting for space" before each pause; may raise. Default: logs it once,
            and tells the hook of `on_wait`.
        folder: that is written to, for the message; default: the one that the error names.
        patience_s: after which the error is raised.

    Returns:
        What `write` returns.
    """
    first: float | None = None
    said = False
    while True:
        try:
            return write()
        except Exception as error:
            if not is_full(error):
                raise
            now = time.monotonic()
            first = now if first is None else first
            if now - first >= patience_s:
                raise
            message = _full_text(folder or _folder_of(error))
        if wait is not None:
            wait(message)
        else:
            if not said:
                logger.warning(message)
            said = True
            for hook in _hooks:
                hook(message)
        time.sleep(max(0.0, RETRY_S - (time.monotonic() - now)))


def _folder_of(error: BaseException | None) -> Path | None:
    while error is not None:
        if isinstance(error, OSError) and isinstance(error.filename, str):
            return Path(error.filename).parent
        error = error.__cause__ or error.__context__
    return None


def _full_text(folder: Path | None) -> str:
    if folder is None:
        return "the storage is full; waiting for space"
    try:
        found = shutil.disk_usage(folder)
    except OSError:
        return f"{mount.shown(folder)} is full; waiting for space"
    free, total = found.free / 2**30, found.total / 2**30
    return f"{mount.shown(folder)} is full ({free:.2g} of {total:.3g} GiB free); waiting for space"
