"""When a running trial is saved: by time, and for a small share of it."""

from __future__ import annotations

import time

SHARE = 0.02
"""Of a trial's time, at most, goes into its checkpoints once it is known what one takes."""


class SaveClock:
    """Says when the next save is due. every_s: seconds between two, at least."""

    def __init__(self, every_s: float) -> None:
        self._every_s, self._after = every_s, 0.0
        self.start()

    def start(self) -> None:
        """A trial has begun."""
        self._after = time.monotonic() + self._every_s

    def is_due(self) -> bool:
        """Whether to save now."""
        return time.monotonic() >= self._after

    def note(self, seconds: float) -> None:
        """A save has taken this long."""
        self._after = time.monotonic() + max(self._every_s, seconds / SHARE)
