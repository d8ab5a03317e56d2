"""What a terminal shows while a sweep runs: a live table, or a plain line for each trial that ends where nobody watches."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.plan import Plan, trial_columns
from launch.plan_text import setting_words

_ENDED_SHOWN = 8


class Board:
    """The state of a sweep's trials and its picture.

    Args:
        plan: the trials.
        console: where to draw; a live table if it is a terminal.
        n_ended: trials that had ended before (a resumed sweep).
        n_trials: that will have ended in all; default: as many as the plan runs.
    """

    def __init__(self, plan: Plan, console: Console, *, n_ended: int = 0, n_trials: int | None = None) -> None:
        self._console = console
        self._n_trials, self._n_ended = plan.n_to_run if n_trials is None else n_trials, n_ended
        columns = trial_columns(plan)
        self._settings = {trial.trial_id: setting_words(trial, columns) for trial in plan.trials}
        self._width = max(map(len, self._settings.values()))
        self._running: dict[str, Mapping[str, Any]] = {}
        self._last: list[Mapping[str, Any]] = []
        self._started = time.monotonic()
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)

    def __enter__(self) -> Board:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def update(self, trial_id: str, metrics: Mapping[str, Any]) -> None:
        """A running trial has reported."""
        self._running[trial_id] = dict(metrics)

    def end(self, row: Mapping[str, Any]) -> None:
        """A trial has ended."""
        self._running.pop(row["trial_id"], None)
        self._n_ended += 1
        self._last = [*self._last, row][-_ENDED_SHOWN:]
        if not self._console.is_terminal:
            self.say(self._line(row))

    def say(self, text: str) -> None:
        """Print a line, above the table where there is one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def render(self) -> Group:
        """The picture: how far, what runs, what ended last."""
        seconds = int(time.monotonic() - self._started)
        head = Table.grid(padding=(0, 2))
        head.add_row(
            ProgressBar(total=self._n_trials, completed=self._n_ended, width=40),
            f"{self._n_ended} of {self._n_trials} trials, {seconds // 60}:{seconds % 60:02d}",
        )
        table = Table(box=None, padding=(0, 1), header_style="bold")
        table.add_column("trial")
        for name in ("step", "retain %", "forget %", "test %", "forget +", "retain -"):
            table.add_column(name, justify="right")
        table.add_column("")
        for row in self._last:
            table.add_row(*self._cells(row["trial_id"], row), Text(_end_of(row), style="red" if _has_failed(row) else "dim"))
        for trial_id, metrics in self._running.items():
            table.add_row(*self._cells(trial_id, metrics), "running", style="bold")
        return Group(head, table)

    def _cells(self, trial_id: str, metrics: Mapping[str, Any]) -> list[str]:
        step, total = metrics.get("step", metrics.get("steps")), metrics.get("total_steps")
        return [
            self._settings[trial_id],
            "-" if step is None else f"{step}/{total}" if total else str(step),
            *(_percent(metrics.get(f"{split}_accuracy")) for split in ("retain", "forget", "test")),
            *(_signed(metrics.get(name)) for name in ("forget_quality", "retain_utility")),
        ]

    def _line(self, row: Mapping[str, Any]) -> str:
        width = len(str(self._n_trials))
        accuracies = " ".join(f"{split} {_percent(row.get(f'{split}_accuracy')):>5}%" for split in ("retain", "forget", "test"))
        seconds = row.get("train_s") or 0.0
        return (
            f"[{self._n_ended:>{width}}/{self._n_trials}] {self._settings[row['trial_id']]:<{self._width}}  {accuracies}  "
            f"{row.get('steps') or 0:>4} steps  {seconds:5.1f} s  {_end_of(row)}"
        )


def _has_failed(row: Mapping[str, Any]) -> bool:
    return row.get("status") == "failed"


def _end_of(row: Mapping[str, Any]) -> str:
    return str(row.get("error") or "failed").splitlines()[0][:120] if _has_failed(row) else str(row.get("stop_reason"))


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}" if isinstance(value, (int, float)) and math.isfinite(value) else "-"


def _signed(value: Any) -> str:
    return f"{value:+.3g}" if isinstance(value, (int, float)) and math.isfinite(value) else "-"
