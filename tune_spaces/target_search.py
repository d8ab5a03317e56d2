"""The search for a setting that meets conditions: a model of each condition says where all of them are likeliest to hold.

Not a sampler of optuna: in the sum of the violations forgetting too little and too much look alike, and the signs of the gaps are
lost. On the quickstart's grid TPE on that sum had about the same median, but the worst of 20 seeds took 42 trials, here 25.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hamu.reports.rows import status_of
from tune_spaces.goals import Condition
from tune_spaces.pool import Pool

START = 6
"""Trials far apart that run before the models are asked."""

EXPLORE = 4
"""Every 4th trial after these is the one farthest from all that ran: models that are sure of a wrong place would stay there."""

_MOST_TRIALS = 200  # that a model is fitted to, the latest: the time of a fit grows with the cube


class TargetChooser:
    """Chooses the trial that most likely meets all conditions, by a Gaussian process of each condition's signed gap.

    It begins with START trials spread over the pool, and every EXPLORE-th one goes where none ran near. Gaps are compressed
    (asinh over their median size), so that a diverged trial does not drown the others. Trials without a result (failed, pruned,
    a metric missing) teach nothing.

    Args:
        pool: the trials.
        conditions: all to be met.
        seed: of the start.
    """

    def __init__(self, pool: Pool, conditions: Sequence[Condition], *, seed: int) -> None:
        self._pool, self._conditions = pool, tuple(conditions)
        self._start = pool.spread(START, np.random.default_rng(seed))
        self._features = dict(zip(pool.ids, pool.features(), strict=True))
        self._gaps: dict[str, list[float]] = {}

    def choose(self, left: Sequence[str]) -> str:
        """Choose one of the trials that did not run yet; of equals the first in the pool's order."""
        for trial_id in self._start:
            if trial_id in left:
                return trial_id
        if len(self._gaps) < 2:
            return left[0]
        if len(self._gaps) % EXPLORE == 0:
            return self._pool.farthest(left)
        known = list(self._gaps)[-_MOST_TRIALS:]
        gaps = np.array([self._gaps[trial_id] for trial_id in known])
        x, asked = (np.array([self._features[trial_id] for trial_id in some]) for some in (known, left))
        chances = sum(_log_chance(x, gaps[:, i], asked) for i in range(gaps.shape[1]))
        return left[int(np.argmax(chances))]

    def learn(self, trial_id: str, row: Mapping[str, Any]) -> None:
        """Learn of a trial that ended."""
        gaps = [condition.gap(row) for condition in self._conditions]
        known = [gap for gap in gaps if gap is not None]
        if status_of(row) == "finished" and len(known) == len(gaps):
            self._gaps[trial_id] = known


def _log_chance(x: np.ndarray, gaps: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Log probability that the gap is at most 0 at each asked place: (asked,).

    Args:
        x: (trials, features). gaps: (trials,), at most 0 where met. asked: (places, features).
    """
    from scipy.stats import norm  # with scikit-learn a second of imports, which sweeps without a target never pay
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    sizes = np.abs(gaps[gaps != 0.0])
    y = np.arcsinh(gaps / np.median(sizes)) if sizes.size else gaps
    kernel = ConstantKernel(1.0, (0.05, 50.0)) * RBF(np.full(x.shape[1], 0.5), (0.1, 10.0)) + WhiteKernel(1e-2, (1e-4, 1.0))
    model = GaussianProcessRegressor(kernel, random_state=0)  # its mean is the limit: where nothing is known, chances are even
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at the end of its range is fine
        mean, deviation = model.fit(x, y).predict(asked, return_std=True)
    return norm.logcdf(-mean / np.maximum(deviation, 1e-9))
