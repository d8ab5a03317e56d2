"""Population based training whose choices have a seed of their own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.tune.schedulers import PopulationBasedTraining


class SeededPopulation(PopulationBasedTraining):
    """Ray Tune's population based training, drawing from its own generator.

    Ray's draws whom a trial goes on from, and with which settings, from Python's global `random`, which Ray and others draw from
    too. The same results in the same order get the same choices here; in several slots the order is up to the clock.

    Args:
        seed: of the choices.
        settings: of Ray's scheduler.
    """

    def __init__(self, *, seed: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._draws = random.Random(seed).getstate()

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """As Ray's, by the own generator."""
        with self._own_draws():
            super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """As Ray's, by the own generator."""
        with self._own_draws():
            return super().on_trial_result(tune_controller, trial, result)

    @contextmanager
    def _own_draws(self) -> Iterator[None]:
        others = random.getstate()
        random.setstate(self._draws)
        try:
            yield
        finally:
            self._draws = random.getstate()
            random.setstate(others)
