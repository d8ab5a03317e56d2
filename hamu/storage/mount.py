"""An artifact root in an object store, such as s3://bucket/hamu: a local mirror folder that everything else works in.

    root = mount("s3://bucket/hamu", scratch)   # <scratch>/hamu-store/s3/bucket/hamu, a plain path that says where it belongs
    fetch(path)                                 # before reading what another process may have written
    publish(path)                               # after writing otherwise than through `files.replacing`, which does it itself

Any process that is given such a path finds the store by it. Another path is in no store, and all of this does nothing there. The
store decides: where it has another version of a file than the mirror has, that is taken, and what has gone from it goes here too.
A file that was only written here stays. Names with a leading dot (temporary files, leases) are no business of the mirror's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hamu.errors import ConfigError
from hamu.storage.mirror import LAST, Mirror

__all__ = [
    "LAST",
    "exists",
    "fetch",
    "is_left_alone",
    "is_url",
    "listed",
    "look",
    "mount",
    "place_of",
    "publish",
    "published",
    "remove",
    "shown",
    "store_of",
    "upload",
    "url_of",
]

_FOLDER = "hamu-store"
_INSIDE = f"/{_FOLDER}/"

_mirrors: dict[str, Mirror] = {}  # by their folders
_left_alone: set[str] = set()  # mirrors that a dry run only names


def is_url(text: str) -> bool:
    """Whether a root is a store's address; a path never has "://"."""
    return "://" in text


def mount(url: str, scratch: Path, *, probe: bool = True, asks_store: bool = True) -> Path:
    """Give the local mirror of a store, the same folder for the same URL.

    Args:
        url: protocol://bucket/folder, of a store that fsspec knows; what it needs to get in comes from the store's own settings.
        scratch: a folder of this machine with space for what is read and written; the same path on every node.
        probe: prove that the store creates a file for one process only.
        asks_store: False, for a dry run: give the path alone, and leave the store alone in this process from now on.

    Raises:
        ConfigError: the store is not known, cannot be reached or written, or has no exclusive create.
    """
    scheme, _, inside = url.partition("://")
    parts = [part for part in inside.split("/") if part]
    if scheme == "file":
        return Path("/", *parts)
    if not parts:
        raise ConfigError(f"the storage path {url} names no bucket; give protocol://bucket/folder")
    folder = Path(os.path.abspath(scratch), _FOLDER, scheme, *parts)
    if not asks_store:
        _left_alone.add(str(folder))
        return folder
    _left_alone.discard(str(folder))
    mirror = _mirror_of(folder)
    assert mirror is not None
    folder.mkdir(parents=True, exist_ok=True)
    if probe:
        from hamu.storage.lease import MEND, probe_exclusive

        if _only_looks(mirror[0].store):
            raise ConfigError(
                f"the store {url} ({type(mirror[0].store).__name__}) has no exclusive create, so that no sweep could own its "
                f"folder; {MEND}"
            )
        probe_exclusive(folder)
    return folder


def url_of(path: Path) -> str | None:
    """Where a path lies in a store; None where it does not."""
    place = _place_of(path)
    return None if place is None else "/".join(filter(None, (f"{place[1]}://{place[2]}", place[3])))


def shown(path: Path) -> str:
    """What a user calls a path: its URL in a store, else the path."""
    return url_of(path) or str(path)


def place_of(text: str, *, near: Path) -> Path:
    """The path of what `shown` gave, which another machine may have written: in the same mirror as `near`, if it is a URL.

    Args:
        text: a URL or a path.
        near: any path of the artifact root that it was written in.
    """
    place = _place_of(near)
    scheme, _, inside = text.partition("://")
    if place is None or not is_url(text):
        return Path(text)
    return Path(place[0], _FOLDER, scheme, *filter(None, inside.split("/")))


def is_left_alone(path: Path) -> bool:
    """Whether a path is in a store that this process only names and never asks (`asks_store=False`)."""
    return any(Path(path).is_relative_to(folder) for folder in _left_alone)


def store_of(path: Path) -> tuple[Any, str] | None:
    """The fsspec file system of a mirrored path, and its name there; None where it is in no store."""
    found = _mirror_of(path)
    return None if found is None else (found[0].store, found[0].remote(found[1]))


def fetch(path: Path, *, only: Callable[[str], bool] | None = None) -> None:
    """Bring a file or folder of a mirror up to date, deletions included.

    Args:
        path: in no store nothing is done.
        only: of a folder's files, those wanted, by their names relative to it ("a/row.json"); default: all.
    """
    if (found := _mirror_of(path)) is not None:
        found[0].fetch(found[1], only)


def look(path: Path) -> None:
    """As `fetch` of one file; of a network folder, have this machine ask the server anew whether the file is there.

    An NFS client that has once not found a file goes on not finding it for half a minute, until it lists the folder.
    """
    fetch(path)
    for folder in (path.parent.parent, path.parent):
        with contextlib.suppress(OSError):
            os.listdir(folder)


def exists(path: Path) -> bool:
    """Whether a file or a folder is there, in the store where the path is in one; nothing is fetched."""
    if (found := _mirror_of(path)) is not None:
        return found[0].exists(found[1])
    return path.exists()


def listed(folder: Path) -> list[str]:
    """Names of what is in a folder, hidden files too, in the store where it is in one; none where there is no folder."""
    if (found := _mirror_of(folder)) is not None:
        return found[0].listed(found[1])
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def publish(path: Path) -> None:
    """Bring the store up to date with a file or folder that was written in the mirror, deletions included.

    A file called record.json or row.json, which says that the others are there, is taken away first and put last.
    """
    if (found := _mirror_of(path)) is not None:
        found[0].publish(found[1])


def remove(path: Path) -> None:
    """Remove a file or a whole folder, in the store too; one that is not there is no error."""
    if (found := _mirror_of(path)) is not None:
        found[0].remove(found[1])
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def upload(temporary: Path, *, as_path: Path) -> None:
    """Put a finished temporary file into the store under its later name; `published` follows when it has that name here."""
    if (found := _mirror_of(as_path)) is not None:
        found[0].put([(temporary, found[1])])


def published(path: Path) -> None:
    """Note that a file of the mirror is what the store has, after `upload`."""
    if (found := _mirror_of(path)) is not None:
        found[0].note([found[1]])


def _place_of(path: Path) -> tuple[str, str, str, str] | None:
    """Scratch folder, protocol, bucket and name in it, which a mirrored path tells."""
    text = os.fspath(path)
    if _INSIDE not in text:
        return None
    scratch, _, rest = text.partition(_INSIDE)
    scheme, _, rest = rest.partition("/")
    bucket, _, name = rest.partition("/")
    return (scratch, scheme, bucket, name.rstrip("/")) if bucket else None


def _mirror_of(path: Path) -> tuple[Mirror, str] | None:
    place = _place_of(path)
    if place is None:
        return None
    if _left_alone and is_left_alone(path):
        return None
    scratch, scheme, bucket, name = place
    folder = Path(scratch, _FOLDER, scheme, bucket)
    key = str(folder)
    if key not in _mirrors:
        store, root = _open(f"{scheme}://{bucket}")
        _mirrors[key] = Mirror(store, root, folder, versions=Path(scratch, _FOLDER, ".versions", scheme, bucket))
    return _mirrors[key], name


def _open(url: str) -> tuple[Any, str]:
    try:
        import fsspec

        store, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        scheme = url.partition("://")[0]
        mend = "pip install 'hamu-sweeps[s3]'" if scheme in ("s3", "s3a") else f"install fsspec's package for {scheme}"
        raise ConfigError(f"the storage path {url} needs a library that is not installed ({error}); {mend}") from None
    except ValueError as error:
        raise ConfigError(f"the storage path {url}: fsspec knows no such store ({error}); give s3://, gs:// or a path") from None
    return store, root.rstrip("/")


def _only_looks(store: Any) -> bool:
    """Whether fsspec only looks before it creates a file in this store: two processes may both see nothing there."""
    import fsspec

    return type(store).pipe_file is fsspec.AbstractFileSystem.pipe_file and not hasattr(store, "_pipe_file")
