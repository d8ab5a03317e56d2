"""Ending trials early: how Ray Tune is told to stop the worse trials of a sweep, or to let them go on from better ones.

    asha   at steps that grow by a factor of 3 the worse two thirds of the trials are stopped, each at once
    pbt    every trial runs to its end; one of the worst quarter goes on from the state of one of the best, with a setting changed

Both go by `SearchSettings.score`, and by the trials' own step. A trial that HAMU's criterion ends, ends by itself: the rule, how
many steps in a row it must hold and at what margin are settings of the trial (`stopping_rule`, `stopping_patience`,
`stopping_softness`). Ray is imported when a scheduler is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hamu.errors import ConfigError
from hamu.reports.views import enough

if TYPE_CHECKING:
    from tune_spaces.search import SearchSettings

TIME = "step"
ADJUSTABLE = ("learning_rate", "constraint_ratio")
"""Settings that population based training may change where they vary in a plan."""

_METHOD = "unlearning_method"
_FACTOR = 3


def balance(metrics: Mapping[str, Any]) -> float | None:
    """One number for a trial: min(forget_quality, 2 ln n_classes) + retain_utility, in nats; None where it lacks one of the two.

    A forget loss may grow without bound, and from twice that of a guess on that says no more.
    """
    quality, utility = metrics.get("forget_quality"), metrics.get("retain_utility")
    if quality is None or utility is None:
        return None
    return min(quality, enough(metrics.get("n_classes"))) + utility


def check_scheduler(settings: SearchSettings, pool: Sequence[Mapping[str, Any]], n_originals: int) -> None:
    """Refuse a scheduler that the trials of a plan do not suit.

    Args:
        settings: with the scheduler's name, or None for none.
        pool: the trials' flat settings.
        n_originals: models that the trials start from.

    Raises:
        ConfigError: as said.
    """
    name = settings.scheduler
    if name is None:
        return
    if settings.score.removeprefix("-") == "forget_closeness":
        raise ConfigError(
            f"scheduler {name!r} with score {settings.score!r}: a trial that runs is not compared with a retrained model; use "
            "--score balance, or --score forget_quality"
        )
    if any(config.get("eval_strategy") == "no" for config in pool):
        raise ConfigError(
            f"scheduler {name!r} goes by the trials' evaluations, and eval_strategy is 'no'; use --set eval_strategy=epoch, or "
            "leave out --scheduler"
        )
    if not SCHEDULERS[name].pauses:
        return
    if settings.name != "grid":
        raise ConfigError(
            f"scheduler {name!r} with search {settings.name!r}: it compares all trials from their start, and a search proposes "
            "them one by one; use --search grid, or --scheduler asha"
        )
    if settings.until is not None or settings.target or settings.trials is not None:
        raise ConfigError(
            f"scheduler {name!r} runs all trials side by side, so --trials, --until and --target have nothing to choose; leave "
            "them out, or use --scheduler asha"
        )
    methods = sorted({str(config.get(_METHOD)) for config in pool})
    if len(methods) > 1:
        raise ConfigError(
            f"scheduler {name!r} hands the weights of a trial on to others, so all have one method, got {', '.join(methods)}; "
            f"choose one, e.g. --set method={'hamu-q' if 'hamu-q' in methods else methods[0]}"
        )
    if n_originals > 1:
        raise ConfigError(
            f"scheduler {name!r} hands the weights of a trial on to others, so all start from one original, got {n_originals}; "
            "give what they differ in one value, e.g. --set seed=42 --set forget_class=0"
        )
    if not adjustable_of(pool):
        raise ConfigError(
            f"scheduler {name!r} varies learning_rate and constraint_ratio, and the trials have one value of each; give several, "
            "e.g. --set lr=0.01,0.02, or use --scheduler asha"
        )


def adjustable_of(pool: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The values, in order, of the settings that population based training may change: those that vary in the pool."""
    values = {name: sorted({config[name] for config in pool if config.get(name) is not None}) for name in ADJUSTABLE}
    return {name: each for name, each in values.items() if len(each) > 1}


def make_scheduler(settings: SearchSettings, adjustable: Mapping[str, Sequence[float]], *, every: int, total: int) -> Any:
    """The scheduler of Ray Tune that the settings name, or None.

    Args:
        settings: its name, the score to go by, the seed.
        adjustable: setting -> the values that it may be given (population based training).
        every: steps between two evaluations of a trial; none is stopped or changed before the first of them.
        total: steps of a trial that runs to its end.

    Raises:
        ConfigError: a trial ends before there is anything to decide.
    """
    if settings.scheduler is None:
        return None
    if every >= total:
        raise ConfigError(
            f"scheduler {settings.scheduler!r}: trials of {total} steps that evaluate every {every} end before it can decide "
            "anything; use --set eval_strategy=steps --set eval_steps=0.25 (of an epoch), or more epochs"
        )
    return SCHEDULERS[settings.scheduler].make(settings, adjustable, every=every, total=total)


class Make(Protocol):
    """Makes a scheduler of Ray Tune; as `make_scheduler`."""

    def __call__(self, settings: SearchSettings, adjustable: Mapping[str, Sequence[float]], *, every: int, total: int) -> Any:
        """The scheduler."""


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """An entry of SCHEDULERS. pauses: it has trials wait for each other, so that it has to know all of them from the start."""

    make: Make
    pauses: bool


def _halving(settings: SearchSettings, adjustable: Mapping[str, Sequence[float]], *, every: int, total: int) -> Any:
    from ray.tune.schedulers import ASHAScheduler

    # No decision at the last step: a trial that has come so far is not called stopped.
    return ASHAScheduler(
        time_attr=TIME,
        **_score_of(settings),
        grace_period=every,
        max_t=max(every, total - 1),
        reduction_factor=_FACTOR,
        stop_last_trials=False,
    )


def _population(settings: SearchSettings, adjustable: Mapping[str, Sequence[float]], *, every: int, total: int) -> Any:
    from tune_spaces.seeded_population import SeededPopulation

    return SeededPopulation(
        seed=settings.seed,
        time_attr=TIME,
        **_score_of(settings),
        perturbation_interval=every,
        hyperparam_mutations={name: list(values) for name, values in adjustable.items()},
        require_attrs=False,
    )


def _score_of(settings: SearchSettings) -> dict[str, Any]:
    return {"metric": settings.score.removeprefix("-"), "mode": "min" if settings.score.startswith("-") else "max"}


SCHEDULERS: dict[str, Scheduler] = {
    "asha": Scheduler(make=_halving, pauses=False),
    "pbt": Scheduler(make=_population, pauses=True),
}
"""The schedulers by name."""
