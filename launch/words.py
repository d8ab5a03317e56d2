"""Lines on the terminal while a sweep gets ready."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from hamu.cli.security import without_secrets


class Words:
    """Says what happens; on a terminal with a spinner for what takes a while."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """Print a line as it is."""
        self.console.print(without_secrets(text), highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Say what is being done, for as long as it is."""
        if self.console.is_terminal:
            with self.console.status(text):
                yield
        else:
            self.say(f"{text} ...")
            yield
