"""A JSON file to which several processes, also of several machines, add what each knows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hamu.errors import CorruptError
from hamu.storage import mount
from hamu.storage.files import read_json, set_aside, tell, write_json
from hamu.storage.lease import Lease

PATIENCE_S = 60.0


@contextmanager
def changing_json(path: Path, empty: Any, *, patience_s: float = PATIENCE_S) -> Iterator[Any]:
    """Give what a file holds, to be changed in place while no other process can; what has changed is written after the block.

    A block that fails writes nothing. A file that is broken is named and set aside.

    Args:
        path: of the file; its lease lies beside it, as `.lease-<name>.<generation>`.
        empty: a list or dict to begin with where there is none, or one of another kind.
        patience_s: how long to wait for others that do the same.

    Raises:
        LeaseError: another process had it all that time.
    """
    with Lease(path.parent, f".lease-{path.name}", patience_s=patience_s) as lease:
        mount.look(path)
        before = _read(path, empty)
        value = copy.deepcopy(before)
        yield value
        if value != before:
            lease.check()
            write_json(path, value)


def _read(path: Path, empty: Any) -> Any:
    try:
        found = read_json(path)
    except FileNotFoundError:
        return copy.copy(empty)
    except CorruptError as error:
        tell(f"{mount.shown(path)} is broken ({error.why}), set aside as {set_aside(path).name}; it is begun anew")
        return copy.copy(empty)
    return found if isinstance(found, type(empty)) else copy.copy(empty)
