"""Who runs a sweep, a share of it, or a trial: the leases of their folders (hamu/storage/lease.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hamu.errors import LeaseError
from hamu.storage import mount
from hamu.storage.lease import Lease, holder_of

LEASE = ".lease"
PART_LEASE = ".lease-part-"

TRIAL_PATIENCE_S = 150.0
"""Longer than a lost node's processes can go on: after a minute without its head Ray ends them."""


@contextmanager
def hold_sweep(path: Path, part: str | None = None, *, say: Callable[[str], None] | None = None) -> Iterator[Lease]:
    """Hold a sweep's folder while it runs; a process that dies loses it.

    Args:
        path: of the folder.
        part: the share of the sweep that is run, such as "1-of-4"; other shares of as many may be run at the same time.
            Default: all.
        say: told when another machine's heartbeat has to be watched, which takes up to 15 s.

    Raises:
        LeaseError: another process holds it, or the same share of it, or a share of another number of shares, or (where all is
            wanted) any share, or (where a share is wanted) all.
    """
    with Lease(path, LEASE if part is None else f"{PART_LEASE}{part}", say=say) as lease:
        # Taken first and asked then: of two that do so at the same time, at least one sees the other.
        for other in _excluded(path, part):
            if (holder := holder_of(path, f"{PART_LEASE}{other}" if other else LEASE, say=say)) is not None:
                raise LeaseError(f"{mount.shown(path)} is in use by {holder}{_mend(part, other)}")
        yield lease


def _excluded(path: Path, part: str | None) -> list[str]:
    """What may not be held beside a share, or beside all: names of shares, "" for all."""
    names = {name.rpartition(".")[0] for name in mount.listed(path) if name.startswith(PART_LEASE)}
    parts = sorted(name.removeprefix(PART_LEASE) for name in names)
    if part is None:
        return parts
    return ["", *(other for other in parts if _count(other) != _count(part))]


def _count(part: str) -> str:
    return part.rpartition("-of-")[2]


def _mend(part: str | None, other: str) -> str:
    what = f" as part {_said(other)}" if other else ""
    if part is None or not other:
        return f"{what}; wait for it, stop it, or choose another --name"
    return (
        f"{what}, and part {_said(part)} divides the same trials in another way, so that some would run twice; give all shares "
        "the same count, wait for it, or choose another --name"
    )


def _said(part: str) -> str:
    return part.replace("-of-", "/")


def trial_lock(folder: Path, *, patience_s: float = TRIAL_PATIENCE_S, say: Callable[[str], None] | None = None) -> Lease:
    """The lease of a trial's folder, to hold while it trains; `check` it before writing.

    After a `kill -9` of a sweep its workers live for a second or two, and after a cut of the network for longer. A resumed sweep
    waits for the lease until they are gone, so two processes never write one trial. Entering it raises a LeaseError where another
    process still has it after `patience_s` seconds.
    """
    return Lease(folder, patience_s=patience_s, say=say)
