"""The scheduler that a plan's search settings name, fitted to the plan's trials. Torch-free; Ray is imported when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hamu.tasks.catalog import modality_of
from hamu.training.steps import steps_per_epoch, total_steps
from launch.plan import Plan, data_key
from tune_spaces.schedulers import SCHEDULERS, adjustable_of, check_scheduler, make_scheduler

if TYPE_CHECKING:
    from hamu.tasks.base import Data
    from hamu.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A scheduler of Ray Tune, and the settings of trials that it may change."""

    scheduler: Any = None
    adjustable: tuple[str, ...] = ()


def check_schedule(plan: Plan) -> None:
    """Refuse a plan whose scheduler its trials do not suit.

    Raises:
        ConfigError: as `tune_spaces.schedulers.check_scheduler`.
    """
    if plan.search.scheduler is not None:
        pool = [settings_of(config) for config in plan.configs.values()]
        check_scheduler(plan.search, pool, n_originals=len({trial.original for trial in plan.trials}))


def schedule_of(plan: Plan, data: Mapping[str, Data]) -> Schedule:
    """Make the scheduler of a plan.

    Args:
        plan: that `check_schedule` has passed.
        data: the loaded rows, by `data_key`.

    Raises:
        ConfigError: the trials are too short for it.
    """
    if plan.search.scheduler is None:
        return Schedule()
    steps = [steps_of(config, data) for config in plan.configs.values()]
    # A trial must have been evaluated by the first decision, and not have ended by it.
    every, total = max(every or total for every, total in steps), min(total for _, total in steps)
    values = adjustable_of([settings_of(config) for config in plan.configs.values()])
    scheduler = make_scheduler(plan.search, values, every=every, total=total)
    return Schedule(scheduler=scheduler, adjustable=tuple(values) if SCHEDULERS[plan.search.scheduler].pauses else ())


def steps_of(config: TrainConfig, data: Mapping[str, Data]) -> tuple[int | None, int]:
    """Steps between two evaluations of a trial (None: it has none on its way), and steps in all, as its run counts them."""
    per_epoch = steps_per_epoch(_n_retain(config, data), config.rows_per_step)
    return config.logging.every("eval", per_epoch), total_steps(config.training.num_train_epochs, per_epoch)


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """A trial's flat settings, with the learning rate and the constraint ratio that they come to."""
    return config.to_flat() | {"learning_rate": config.lr, "constraint_ratio": config.constraint_ratio}


def _n_retain(config: TrainConfig, data: Mapping[str, Data]) -> int:
    return modality_of(config).n_retain(config, data[data_key(config)])
