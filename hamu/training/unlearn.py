"""`hamu.unlearn`: unlearning for a model and datasets of one's own, in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hamu.tasks.own import OwnTask, Rows
from hamu.training.config import TrainConfig
from hamu.training.loop import TrainingRun
from hamu.training.progress import watch


@dataclass(frozen=True, kw_only=True)
class Unlearned:
    """What `unlearn` did. before, after: losses (nats), accuracies, entropies and membership AUCs by split. stop_reason: why it
    ended. hardness: S, the largest feasible constraint ratio and kappa at the first step. message: said on an early end."""

    before: dict[str, float]
    after: dict[str, float]
    stop_reason: str
    steps: int
    hardness: dict[str, float]
    message: str | None


def unlearn(
    model: nn.Module,
    retain: Rows,
    forget: Rows,
    *,
    test: Rows | None = None,
    method: str = "hamu-q",
    lr: float,
    epochs: float = 1.0,
    batch_size: int = 128,
    seed: int = 42,
    progress: bool = True,
    on_report: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> Unlearned:
    """Unlearn the forget rows from a classifier, in place.

    Args:
        model: any module that maps inputs (n, ...) to logits (n, classes); changed in place, on the device it is on.
        retain, forget: torch Datasets of (input, label), or pairs of tensors (inputs (n, ...), labels (n,)). Held in memory.
        test: rows to report on besides; optional.
        method: a key of METHODS.
        lr: learning rate, > 0.
        epochs: passes over the retain rows; a fraction is allowed.
        batch_size: rows of each role a step.
        seed: of the order of rows.
        progress: draw a progress line on a terminal when it takes longer than two seconds.
        on_report: called with each recorded step and evaluation.
        settings: any other setting of `python -m hamu.cli.train`, by its name: constraint_ratio=0.5, stopping_rule="feasible".

    Raises:
        ConfigError: a setting is unknown, out of range, or larger than any gradients could meet.
        DataError: the rows are not (input, label) pairs, or a set is empty.
    """
    config = TrainConfig.from_flat(
        {
            "unlearning_method": method,
            "learning_rate": lr,
            "num_train_epochs": epochs,
            "per_device_train_batch_size": batch_size,
            "seed": seed,
            **settings,
        }
    )
    task = OwnTask(retain, forget, test, model=model, device=next(model.parameters()).device)
    run = TrainingRun(config, task, model)
    for report in watch(run, title=method, enabled=progress):
        if on_report is not None:
            on_report(report)
    result = run.result
    assert result is not None
    return Unlearned(
        before=result.before,
        after=result.after,
        stop_reason=str(result.stop_reason),
        steps=result.steps,
        hardness=result.hardness,
        message=result.message,
    )
