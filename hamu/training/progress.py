"""A progress line for anything that takes longer than two seconds; silent where nobody watches a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from hamu.training.loop import TrainingRun

SHOW_AFTER_S = 2.0


def watch(run: TrainingRun, *, title: str, enabled: bool = True) -> Iterator[dict[str, Any]]:
    """Iterate a run and draw its progress on a terminal: steps, speed, and the last losses and accuracies."""
    # tqdm's disable=None means: only on a terminal.
    with tqdm(total=run.total_steps, desc=title, unit="step", delay=SHOW_AFTER_S, disable=None if enabled else True) as line:
        for report in run:
            line.n = run.step
            shown = {
                "retain": report.get("retain_batch_loss", report.get("retain_loss")),
                "forget": report.get("forget_batch_loss", report.get("forget_loss")),
                "test acc": report.get("test_accuracy"),
            }
            line.set_postfix({name: f"{value:.3f}" for name, value in shown.items() if value is not None}, refresh=False)
            line.update(0)
            line.refresh()
            yield report
