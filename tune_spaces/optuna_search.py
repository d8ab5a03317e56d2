"""Optuna's samplers over a pool of trials: TPE and NSGA-II for two objectives.

Only this file imports optuna, and only when a search is made.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hamu.errors import ConfigError
from hamu.reports.views import View
from tune_spaces.pool import Pool

START = 8
"""Trials that are chosen before the sampler is asked: far apart, over all methods and axes.

With 24 trials a sampler that starts at random spends a third of them on chance; the same number spread out tells it more. It is
part of both searches here, and not of random search.
"""
_ATTEMPTS = 8


class OptunaChooser:
    """Chooses trials as a sampler of optuna would, from those that the pool holds.

    The sampler works on the settings that differ between trials; numbers are indices, so that it knows their order, whatever
    their spacing. It may ask for a trial that ran: then it is told that one's known result and asked again, a few times, and
    at last the nearest trial that did not run is taken. A trial runs under its own settings, so the sampler never learns a
    result at a place where it was not measured, except along a setting that the trial lacks.

    Args:
        pool: the trials.
        sampler: a name of SAMPLERS.
        seed: of the start and of the sampler.
        view: its axes are the two objectives, both to be large. A trial without a place in it (failed, pruned, diverged) has no
            result: the sampler is told that it failed.

    Raises:
        ConfigError: optuna is not installed.
    """

    def __init__(self, pool: Pool, *, sampler: str, seed: int, view: View) -> None:
        optuna = _optuna()
        self._pool, self._view, self._optuna = pool, view, optuna
        self._start = pool.spread(START, np.random.default_rng(seed))
        self._space = {
            axis.name: optuna.distributions.IntDistribution(0, len(axis.values) - 1)
            if axis.has_order
            else optuna.distributions.CategoricalDistribution(tuple(range(len(axis.values))))
            for axis in pool.axes
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            made = SAMPLERS[sampler](optuna, seed)
        self._study = optuna.create_study(directions=["maximize", "maximize"], sampler=made)
        self._generation_of = getattr(made, "get_trial_generation", None)
        self._running: dict[str, Any] = {}
        self._results: dict[str, tuple[float, float] | None] = {}

    def choose(self, left: Sequence[str]) -> str:
        """Choose one of the trials that did not run yet."""
        for trial_id in self._start:
            if trial_id in left:
                self._begin(trial_id)
                return trial_id
        for _ in range(_ATTEMPTS):
            asked = self._study.ask(self._space)
            found = self._pool.nearest(asked.params, self._pool.ids)
            if found in left:
                break
            self._tell(asked, self._results.get(found))
        chosen = self._pool.nearest(asked.params, left)
        if found in left and self._is_at(asked.params, chosen):
            self._running[chosen] = asked
        else:
            if found in left:
                self._tell(asked, None)
            self._begin(chosen)
        return chosen

    def learn(self, trial_id: str, row: Mapping[str, Any]) -> None:
        """Tell the sampler of a trial that ended, also of one that it did not choose."""
        self._results[trial_id] = self._view.point(row)
        if trial_id not in self._running:
            self._begin(trial_id)
        self._tell(self._running.pop(trial_id), self._results[trial_id])

    def _begin(self, trial_id: str) -> None:
        """Have the sampler count a trial as running, at its own place."""
        self._study.enqueue_trial(dict(self._pool.points[trial_id]))
        asked = self._study.ask(self._space)
        if self._generation_of is not None:  # a trial that the sampler did not ask for has none yet, and would be no parent
            self._generation_of(self._study, self._study.get_trials(deepcopy=False)[asked.number])
        self._running[trial_id] = asked

    def _is_at(self, point: Mapping[str, int], trial_id: str) -> bool:
        return all(point[name] == place for name, place in self._pool.points[trial_id].items())

    def _tell(self, asked: Any, values: tuple[float, float] | None) -> None:
        if values is None:
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(asked, list(values))


def _nsga2(optuna: Any, seed: int) -> Any:
    # Small, as a budget is a few dozen trials: with the usual population of 50 all of them would be chosen at random. The
    # usual mutation (one setting of each child) is chance again where there are two or three settings.
    return optuna.samplers.NSGAIISampler(population_size=5, mutation_prob=0.2, seed=seed)


def _tpe(optuna: Any, seed: int) -> Any:
    # constant_liar: a trial that runs beside counts as a bad one, so that the next is not put next to it.
    return optuna.samplers.TPESampler(n_startup_trials=START, multivariate=True, constant_liar=True, seed=seed)


SAMPLERS: dict[str, Callable[[Any, int], Any]] = {"tpe": _tpe, "nsga2": _nsga2}
"""Samplers by the name of their search: what makes one of optuna and a seed."""


def check_optuna() -> None:
    """Refuse to go on without optuna, which is not imported here.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            f"searches {' and '.join(map(repr, SAMPLERS))} need optuna, which is not installed; "
            "run: pip install 'hamu-sweeps[search]', or use search grid or random"
        )


def _optuna() -> Any:
    check_optuna()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it would log every trial beside the sweep's own lines
    return optuna
