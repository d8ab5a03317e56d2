"""Which trials of a plan run, and in which order.

A plan lists every trial; a search picks from this pool, never the same trial twice, and learns from what ended:

    search = make_search(settings, pool, view=View("paper"))
    while (trial_id := search.propose()) is not None:       # several may be running before the first is told
        search.tell(trial_id, row_of(trial_id))
    print(search.ended)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hamu.errors import ConfigError, unknown
from hamu.reports.views import View
from hamu.training.records import METRIC_COLUMNS
from tune_spaces.ending_rules import NoGain, TargetMet
from tune_spaces.goals import Condition, parse_conditions
from tune_spaces.optuna_search import SAMPLERS, OptunaChooser
from tune_spaces.pool import Pool
from tune_spaces.pool_search import Chooser, InOrder, PoolSearch, Rule
from tune_spaces.schedulers import SCHEDULERS
from tune_spaces.target_search import TargetChooser

__all__ = ["BALANCE", "SCHEDULERS", "SEARCHES", "Search", "SearchSettings", "make_search"]

BALANCE = "balance"
Settings = Mapping[str, Mapping[str, Any]]
"""trial_id -> flat settings, of every trial of a plan."""
_UNTIL = re.compile(r"no-gain:(?P<trials>[1-9]\d*)")


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How a sweep searches; `dataclasses.asdict` gives its JSON.

    Args:
        name: of SEARCHES: "grid" (in order), "random", or a sampler of optuna, "tpe" or "nsga2".
        trials: the most trials of the plan that run; None: all for a grid without a target, half of them else, see `budget`.
        seed: of every choice, that of a scheduler too.
        until: "no-gain:10": propose no more when the hypervolume has not grown over the last 10 trials that ended.
        target, keep: conditions (tune_spaces/goals.py) that a trial must meet; with them the cheapest such trial is searched for.
        scheduler: "asha", "pbt" or None.
        score: what the scheduler goes by: a metric, "-metric" where less is better, or "balance".

    Raises:
        ConfigError: an unknown name, a number out of range, a condition that cannot be read.
    """

    name: str = "grid"
    trials: int | None = None
    seed: int = 42
    until: str | None = None
    target: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    scheduler: str | None = None
    score: str = BALANCE

    def __post_init__(self) -> None:
        for name in ("target", "keep"):  # JSON gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.name not in SEARCHES:
            raise ConfigError(unknown("search", self.name, SEARCHES))
        if self.trials is not None and self.trials < 1:
            raise ConfigError(f"trials is {self.trials}; a search runs at least 1")
        if self.until is not None and not _UNTIL.fullmatch(self.until):
            raise ConfigError(f"until {self.until!r}: the rule is no-gain:N, N trials of at least 1; e.g. no-gain:10")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise ConfigError(unknown("scheduler", self.scheduler, SCHEDULERS))
        scores = (BALANCE, "forget_closeness", *METRIC_COLUMNS)
        if self.score.removeprefix("-") not in scores or self.score == f"-{BALANCE}":
            raise ConfigError(unknown("score", self.score, scores) + "; a minus before it says that less is better")
        if self.keep and not self.target:
            raise ConfigError(f"keep {', '.join(self.keep)!r} goes with a target; give one, e.g. forget_accuracy<=retrained")
        if self.target and self.name not in ("grid", "random"):
            raise ConfigError(
                f"search {self.name!r} with a target: a target has a search of its own; use --search grid, or random"
            )
        _ = self.conditions

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Target and keep, read."""
        return (*parse_conditions(self.target, "target"), *parse_conditions(self.keep, "keep"))

    @property
    def patience(self) -> int | None:
        """N of "no-gain:N"."""
        found = _UNTIL.fullmatch(self.until or "")
        return int(found["trials"]) if found else None

    def budget(self, n_pool: int) -> int:
        """The most trials that run of a pool of `n_pool`: `trials`, else all of a grid without a target, else half."""
        if self.trials is not None:
            return min(self.trials, n_pool)
        return n_pool if self.name == "grid" and not self.target else max(1, n_pool // 2)


class Search(Protocol):
    """Picks trials from a pool. The order of `propose` and `tell` decides, so replaying the tells of a sweep goes on with it."""

    def propose(self) -> str | None:
        """The trial to run next; None: none now (when others are running, perhaps later; see `ended`)."""

    def tell(self, trial_id: str, row: Mapping[str, Any]) -> None:
        """Learn of a trial that ended (finished, failed, pruned, dropped), one that was not proposed included (on resume)."""

    @property
    def ended(self) -> str | None:
        """Why nothing more is proposed, in words; None while it goes on, and for a grid or budget that was used up."""


def make_search(settings: SearchSettings, pool: Settings, *, view: View) -> Search:
    """Build the search that the settings name.

    Args:
        settings: what to search by.
        pool: trial_id -> flat settings, of every trial of the plan.
        view: the axes that two-objective searches and `until` go by.

    Raises:
        ConfigError: the search needs optuna and it is not installed.

    With a target, models of the conditions choose (tune_spaces/target_search.py), or "random" chance; both stop as soon as one
    trial meets all. "tpe", "nsga2" and a target begin with trials spread over the pool.
    """
    ids, conditions = tuple(pool), settings.conditions
    rules: list[Rule] = []
    if conditions:
        rules.append(TargetMet(conditions))
    if settings.patience is not None:
        rules.append(NoGain(view, settings.patience))
    return PoolSearch(ids, SEARCHES[settings.name](settings, pool, view), budget=settings.budget(len(ids)), rules=rules)


def _in_order(settings: SearchSettings, pool: Settings, view: View) -> Chooser:
    if settings.conditions:
        return TargetChooser(Pool(pool), settings.conditions, seed=settings.seed)
    return InOrder(tuple(pool))


def _by_chance(settings: SearchSettings, pool: Settings, view: View) -> Chooser:
    return InOrder(tuple(pool), settings.seed)


def _by_sampler(settings: SearchSettings, pool: Settings, view: View) -> Chooser:
    return OptunaChooser(Pool(pool), sampler=settings.name, seed=settings.seed, view=view)


SEARCHES: dict[str, Callable[[SearchSettings, Settings, View], Chooser]] = {
    "grid": _in_order,
    "random": _by_chance,
    **dict.fromkeys(SAMPLERS, _by_sampler),
}
"""What makes the chooser of a search, by its name."""
