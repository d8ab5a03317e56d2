"""A progress line for anything that takes longer than two seconds; silent where nobody watches a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from tqdm import tqdm

SHOW_AFTER_S = 2.0


class Watched(Protocol):
    """What is watched: a run."""

    total_steps: int

    @property
    def step(self) -> int:
        """Steps so far."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Give reports, with columns of a record."""


class ProgressLine:
    """The line itself, drawn on a terminal: steps, speed, and the last losses and accuracies."""

    def __init__(self, total_steps: int, *, title: str, enabled: bool = True) -> None:
        # tqdm's disable=None means: only on a terminal.
        self._line = tqdm(total=total_steps, desc=title, unit="step", delay=SHOW_AFTER_S, disable=None if enabled else True)
        self._shown: dict[str, float] = {}

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *exception: object) -> None:
        self._line.close()

    def show(self, step: int, report: Mapping[str, Any]) -> None:
        """Draw the state after a step; numbers that a report has not stay as they were."""
        for name, first, second in (
            ("retain", "retain_batch_loss", "retain_loss"),
            ("forget", "forget_batch_loss", "forget_loss"),
            ("test acc", "test_accuracy", "test_accuracy"),
        ):
            value = report.get(first, report.get(second))
            if value is not None:
                self._shown[name] = value
        self._line.n = step
        self._line.set_postfix({name: f"{value:.3f}" for name, value in self._shown.items()}, refresh=False)
        self._line.update(0)
        self._line.refresh()


def watch(run: Watched, *, title: str, enabled: bool = True) -> Iterator[dict[str, Any]]:
    """Iterate a run and draw its progress line."""
    with ProgressLine(run.total_steps, title=title, enabled=enabled) as line:
        for report in run:
            line.show(run.step, report)
            yield report
