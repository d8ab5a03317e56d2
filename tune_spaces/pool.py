"""The trials of a plan as points that a sampler can move between: which settings differ, in which order, how far apart."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Axis:
    """A setting that differs between the trials.

    Args:
        name: of the setting.
        values: what it takes: numbers rise and have an order, so a sampler is told their index; others, as JSON, have none.
        has_order: whether the values are numbers.
    """

    name: str
    values: tuple[Any, ...]
    has_order: bool

    def place(self, value: Any) -> int:
        """Index of a value."""
        return self.values.index(value if self.has_order else json.dumps(value, sort_keys=True))


class Pool:
    """Points of the trials: setting -> index of its value, for the settings that differ and that the trial has.

    A setting that a trial lacks (a baseline has no constraint_ratio) is no part of its point, and no distance.

    Args:
        settings: trial_id -> flat settings.
    """

    def __init__(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        self.ids = tuple(settings)
        names = dict.fromkeys(name for config in settings.values() for name in config)
        every = (_axis(name, [config[name] for config in settings.values() if config.get(name) is not None]) for name in names)
        self.axes = tuple(
            axis for axis in every
            if len(axis.values) > 1 or (axis.values and any(config.get(axis.name) is None for config in settings.values()))
        )  # fmt: skip
        self.points = {
            trial_id: {axis.name: axis.place(config[axis.name]) for axis in self.axes if config.get(axis.name) is not None}
            for trial_id, config in settings.items()
        }

    @cached_property
    def _table(self) -> np.ndarray:
        """(trials, axes): places, nan where a trial lacks the setting."""
        rows = [[self.points[trial_id].get(axis.name, np.nan) for axis in self.axes] for trial_id in self.ids]
        return np.array(rows, dtype=np.float64).reshape(len(self.ids), len(self.axes))

    def features(self) -> np.ndarray:
        """For a model, (trials, features): an order in [0, 1], 0.5 where lacking; a column for each value without order."""
        columns = []
        for axis, places in zip(self.axes, self._table.T, strict=True):
            if axis.has_order:
                columns.append(np.nan_to_num(places / max(1, len(axis.values) - 1), nan=0.5))
            else:
                columns += [(places == i).astype(float) for i in range(len(axis.values))]
        return np.column_stack(columns) if columns else np.zeros((len(self.ids), 1))

    def distances(self, point: Mapping[str, int]) -> np.ndarray:
        """Distance of each trial from a point: (trials,).

        Along an order it is the share of its length; between values without order (methods) it is 1, and so is having a
        setting and lacking it. A setting that the trial lacks and the point has is 0: the point's value means nothing there.
        """
        return self._differences(np.array([point.get(axis.name, np.nan) for axis in self.axes]), lacking=0.0)

    def spread(self, n: int, rng: np.random.Generator, taken: Collection[str] = ()) -> list[str]:
        """Choose up to n trials far apart: a random first one, then each the farthest from all before it (ties at random)."""
        is_free = np.array([trial_id not in taken for trial_id in self.ids])
        nearest = np.full(len(self.ids), np.inf)
        chosen: list[str] = []
        while len(chosen) < n and is_free.any():
            order = rng.permutation(len(self.ids))
            best = order[np.argmax(np.where(is_free, nearest, -1.0)[order])]
            is_free[best] = False
            chosen.append(self.ids[best])
            nearest = np.minimum(nearest, self._differences(self._table[best], lacking=1.0))
        return chosen

    def farthest(self, among: Sequence[str]) -> str:
        """The one of `among` that is the farthest from all trials that are not among them, the first of equals."""
        wanted = set(among)
        gaps = np.full(len(self.ids), np.inf)
        for row, trial_id in zip(self._table, self.ids, strict=True):
            if trial_id not in wanted:
                gaps = np.minimum(gaps, self._differences(row, lacking=1.0))
        is_wanted = np.array([trial_id in wanted for trial_id in self.ids])
        return self.ids[int(np.argmax(np.where(is_wanted, gaps, -1.0)))]

    def nearest(self, point: Mapping[str, int], among: Sequence[str]) -> str:
        """The trial nearest a point, the first in the pool's order of equals."""
        wanted = set(among)
        is_wanted = np.array([trial_id in wanted for trial_id in self.ids])
        return self.ids[int(np.argmin(np.where(is_wanted, self.distances(point), np.inf)))]

    def _differences(self, values: np.ndarray, *, lacking: float) -> np.ndarray:
        if not self.axes:
            return np.zeros(len(self.ids))
        lengths = np.array([len(axis.values) - 1 if axis.has_order else 0 for axis in self.axes])
        gaps = np.abs(self._table - values)
        gaps = np.where(lengths > 0, gaps / np.maximum(lengths, 1), (gaps > 0).astype(float))
        one_lacks = np.isnan(self._table) != np.isnan(values)
        both_lack = np.isnan(self._table) & np.isnan(values)
        gaps = np.where(one_lacks, np.where(np.isnan(self._table), lacking, 1.0), np.where(both_lack, 0.0, gaps))
        return gaps.sum(axis=1)


def _axis(name: str, values: Sequence[Any]) -> Axis:
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return Axis(name, tuple(sorted(set(values))), True)
    return Axis(name, tuple(dict.fromkeys(json.dumps(value, sort_keys=True) for value in values)), False)
