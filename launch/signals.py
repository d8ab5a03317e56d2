"""SIGINT and SIGTERM end a sweep in order: they are noted when they come, and obeyed where the sweep looks for them.

An exception raised by a handler would come up in the middle of Ray's compiled code, which does not let it pass.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asked the sweep to end. Not an `Exception`, so that Tune lets it pass."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """What the sweep has been sent: the first one ends it in order, a second one at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def install(self) -> None:
        """Take the signals; to be called again after a library took them."""
        for number in _NUMBERS:
            signal.signal(number, self._handle)

    def check(self) -> None:
        """Raise what came, if something did."""
        if self.number is not None:
            raise Interrupted(self.number)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take the signals in here, and give them back."""
        before = {number: signal.getsignal(number) for number in _NUMBERS}
        self.install()
        try:
            yield
            self.check()
        except SystemExit:  # Ray answers SIGTERM so while it starts
            self.number = self.number or signal.SIGTERM
            raise Interrupted(self.number) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            os._exit(128 + number)  # Ray's processes die with this one; plan and rows are on disk
        self.number = number
