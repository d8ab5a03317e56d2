"""A folder that one process owns: a lease with an owner and a heartbeat, which a process that dies loses.

A lease is a row of files `<name>.<generation>`, made with exclusive create (on a store: a conditional put); the highest
generation is the lease. Its file says who holds it, and is touched every two seconds while it is held. To take a lease that was
released, or whose holder is dead, is to create the next generation: of several that try, one can.

A holder of this boot and pid namespace is dead when its process is gone, which is seen at once. Any other, of another machine or
container, is dead when its file has not changed for 15 s of the clock of whoever looks, so no two clocks are compared. A holder
that was only paused finds out with `check` before it writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hamu.errors import ConfigError, LeaseError
from hamu.storage import mount
from hamu.storage.beats import start_beating, stop_beating
from hamu.storage.files import patiently
from hamu.storage.generations import LocalGenerations, StoreGenerations

__all__ = ["Lease", "LeaseError", "holder_of", "probe_exclusive"]

MEND = "give --storage-path a local or NFS folder, or a bucket with conditional writes (S3, Google Cloud Storage, MinIO)"

_RELEASED = "released"
_POLL_S = 0.02  # between looks at a process of this machine
_WATCH_S = 0.25  # between looks at another machine's beat

_Generations = LocalGenerations | StoreGenerations


class Lease:
    """Holds a folder as a context manager.

    Args:
        folder: that is owned; made when missing.
        name: of the lease's files in it, so a folder can have several leases.
        beat_s: seconds between two beats.
        stale_s: seconds without a beat after which another machine's holder is dead.
        patience_s: how long to wait for a holder that is alive.
        say: told once, in a line, when another machine's beat has to be watched.
    """

    def __init__(
        self,
        folder: Path,
        name: str = ".lease",
        *,
        beat_s: float = 2.0,
        stale_s: float = 15.0,
        patience_s: float = 0.0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.folder, self.name = Path(folder), name
        self.beat_s, self.stale_s, self.patience_s = beat_s, stale_s, patience_s
        self._say = say
        self._files = _generations(self.folder, name)
        self._generation: int | None = None
        self._text, self._pid = "", 0
        self._beating = threading.Lock()

    def __enter__(self) -> Lease:
        """Take the lease.

        Raises:
            LeaseError: another process holds it, and still did after `patience_s`.
            OSError: the folder cannot be written.
        """
        assert self._generation is None, "a lease is taken once"
        patiently(lambda: os.makedirs(self.folder, exist_ok=True), folder=self.folder.parent)
        deadline = time.monotonic() + self.patience_s
        watch = _Watch(self._files, self.stale_s, self._say, f"{mount.shown(self.folder)}")
        while True:
            last = max(self._files.listed(), default=0)
            owner = watch.holder(last) if last else None
            if owner is None:
                if self._take(last + 1):
                    break
            elif time.monotonic() >= deadline and watch.is_sure:
                raise LeaseError(
                    f"{mount.shown(self.folder)} is in use by {_said(owner)}; wait for it, stop it, or choose another --name"
                )
            else:
                time.sleep(_POLL_S if watch.is_local else min(_WATCH_S, self.stale_s / 10))
        start_beating(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __del__(self) -> None:
        # A holder that was dropped without a word gives its lease back, as a closed file gives back its lock.
        if getattr(self, "_generation", None) is not None:
            with contextlib.suppress(Exception):
                self.release()

    def release(self) -> None:
        """Give the lease back; its file stays and says so. Does nothing when it is not held."""
        if self._generation is None or self._pid != os.getpid():  # a fork has the object, but not the lease
            return
        stop_beating(self)
        with self._beating:  # a beat on its way would be written over the word that the lease is free
            generation, self._generation = self._generation, None
            with contextlib.suppress(OSError):  # lost, or no longer reachable: then the missing beat tells
                self._files.release(generation, _RELEASED)

    def check(self) -> None:
        """Make sure that the lease is still this process's; call it before writing what another process may own by now.

        Raises:
            LeaseError: it was released, taken over, or its file is gone.
        """
        if self._generation is None or not self._files.is_last(self._generation, self._text):
            raise LeaseError(
                f"{mount.shown(self.folder)} is no longer this process's (it was paused or cut off, and another has taken it); "
                "nothing more is written there"
            )

    def beat(self) -> None:
        """Say that this process lives; the beating thread calls it. A lease that is lost is left alone."""
        with self._beating:
            generation = self._generation
            if generation is not None and self._files.is_last(generation, self._text):
                self._files.beat(generation, self._text)

    def _take(self, generation: int) -> bool:
        """Make a generation; False where another process was faster."""
        text = json.dumps(_self_as_owner())
        if not patiently(lambda: self._files.create(generation, text), folder=self.folder):
            return False
        # Whoever paused between looking and creating may have made a generation again that a later holder had cleared away.
        older = self._files.listed()
        if max(older, default=generation) > generation:
            self._files.remove(generation)
            return False
        self._generation, self._text, self._pid = generation, text, os.getpid()
        for each in sorted(older):  # from the oldest: while one is there, the one that took it over is, too
            if each < generation:
                self._files.remove(each)
        return True


class _Watch:
    """Tells a dead holder from a live one by looking again and again. is_sure: whether the last holder named is known to live."""

    def __init__(self, files: _Generations, stale_s: float, say: Callable[[str], None] | None, folder: str) -> None:
        self._files, self._stale_s, self._say, self._folder = files, stale_s, say, folder
        self._seen: tuple[int, object] | None = None
        self._since = 0.0
        self._has_said = False
        self.is_sure = self.is_local = False

    def holder(self, generation: int) -> dict[str, Any] | None:
        """The owner of a generation while it may live; None: released or dead, so the next generation may be made."""
        found = self._files.read(generation)
        self.is_sure = self.is_local = False
        if found is None:
            # Cleared away by a newer holder, whom the next look finds; an empty listing cannot follow.
            return None if not self._files.listed() else {}
        text, stamp = found
        if text.startswith(_RELEASED):
            return None
        owner = _parsed(text)
        if _is_of_here(owner):
            self.is_sure = self.is_local = _is_running(owner)
            return owner if self.is_sure else None
        if self._seen is None or self._seen[0] != generation:
            self._seen, self._since = (generation, stamp), time.monotonic()
            self._tell(owner)
        elif self._seen[1] != stamp:
            self._seen, self._since, self.is_sure = (generation, stamp), time.monotonic(), True
        elif time.monotonic() - self._since >= self._stale_s:
            return None
        return owner

    def _tell(self, owner: dict[str, Any]) -> None:
        if self._say is not None and not self._has_said:
            self._has_said = True
            self._say(
                f"{self._folder} was last held by {_said(owner)}; watching for up to {self._stale_s:g} s whether it still is"
            )


def holder_of(
    folder: Path, name: str = ".lease", *, stale_s: float = 15.0, say: Callable[[str], None] | None = None
) -> str | None:
    """Who holds a lease, in words; None: nobody. Another machine's beat is watched for up to `stale_s` seconds."""
    files = _generations(Path(folder), name)
    watch = _Watch(files, stale_s, say, mount.shown(Path(folder)))
    while last := max(files.listed(), default=0):
        owner = watch.holder(last)
        if owner is None:
            return None
        if watch.is_sure:
            return _said(owner)
        time.sleep(min(_WATCH_S, stale_s / 10))
    return None


@contextmanager
def _probed(folder: Path) -> Iterator[tuple[_Generations, int]]:
    files = _generations(folder, f".probe-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}")
    os.makedirs(folder, exist_ok=True)
    try:
        yield files, 1
    finally:
        with contextlib.suppress(OSError):
            files.remove(1)


def probe_exclusive(folder: Path) -> None:
    """Prove that a file can be created there by one process only; without that no folder can be owned.

    Raises:
        ConfigError: the second create of one name works too, the store cannot be asked for it, or the place cannot be written.
    """
    try:
        with _probed(Path(folder)) as (files, generation):
            made = [files.create(generation, "first"), files.create(generation, "second")]
            kept = files.read(generation)
    except (OSError, NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(f"{mount.shown(Path(folder))} cannot hold a sweep ({type(error).__name__}: {error}); {MEND}") from None
    if made != [True, False] or kept is None or kept[0] != "first":
        raise ConfigError(
            f"{mount.shown(Path(folder))} lets two processes create one file, so that no sweep could own its folder; {MEND}"
        )


def _generations(folder: Path, name: str) -> _Generations:
    place = mount.store_of(folder)
    return LocalGenerations(folder, name) if place is None else StoreGenerations(*place, name)


@cache
def _machine() -> tuple[str, str]:
    """Boot and pid namespace of this process: where both are equal, a pid means the same process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""


def _started_at(pid: int) -> str | None:
    """When a process started, in clock ticks after the boot; None when it is gone or has only to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


@cache
def _own(pid: int) -> dict[str, Any]:
    boot, namespace = _machine()
    return {"host": socket.gethostname(), "boot": boot, "pid_namespace": namespace, "pid": pid, "started": _started_at(pid)}


def _self_as_owner() -> dict[str, Any]:
    return _own(os.getpid()) | {"since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": os.urandom(8).hex()}


def _parsed(text: str) -> dict[str, Any]:
    try:
        owner = json.loads(text)
    except ValueError:  # created, but not yet written
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_of_here(owner: dict[str, Any]) -> bool:
    return bool(_machine()[0]) and (owner.get("boot"), owner.get("pid_namespace")) == _machine()


def _is_running(owner: dict[str, Any]) -> bool:
    pid = owner.get("pid")
    return isinstance(pid, int) and (started := _started_at(pid)) is not None and started == owner.get("started")


def _said(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"
