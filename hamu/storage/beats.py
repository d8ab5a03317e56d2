"""The heartbeat of all leases that this process holds, in one thread."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Protocol
from weakref import WeakSet


class Beating(Protocol):
    """What beats; beat_s: seconds between two beats."""

    beat_s: float

    def beat(self) -> None:
        """Say that this process lives."""


class _Beats:
    """The leases to beat, and the thread that does it, which starts with the first of them."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._held: WeakSet[Beating] = WeakSet()
        self._lock = threading.RLock()  # a lease that is collected while this is held takes it again
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, lease: Beating) -> None:
        with self._lock:
            self._held.add(lease)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="lease-beats", daemon=True)
                self._thread.start()
            elif lease.beat_s < self._pause_s():
                self._wake.set()

    def remove(self, lease: Beating) -> None:
        with self._lock:
            self._held.discard(lease)

    def _pause_s(self) -> float:
        return min((lease.beat_s for lease in self._held), default=2.0)

    def _run(self) -> None:
        while True:
            with self._lock:
                pause = self._pause_s()
            self._wake.wait(pause)
            self._wake.clear()
            self._beat_all()  # a function of its own: no name here keeps a lease that its owner has dropped

    def _beat_all(self) -> None:
        with self._lock:
            held = list(self._held)
        for lease in held:
            with contextlib.suppress(Exception):  # a storage that is away for a while; whoever writes next finds out
                lease.beat()


_beats: list[_Beats] = []


def _mine() -> _Beats:
    """Those of this process: a fork has its parent's entries, but not the thread."""
    if not _beats or _beats[0].pid != os.getpid():
        _beats[:] = [_Beats()]
    return _beats[0]


def start_beating(lease: Beating) -> None:
    """Beat for a lease from now on."""
    _mine().add(lease)


def stop_beating(lease: Beating) -> None:
    """Beat no more."""
    _mine().remove(lease)
