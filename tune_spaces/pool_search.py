"""A search over a pool: a chooser says which trial is next, a budget and rules say when it is enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from hamu.reports.rows import status_of


class Chooser(Protocol):
    """Chooses among the trials that did not run."""

    def choose(self, left: Sequence[str]) -> str:
        """One of `left`, which is in the pool's order and not empty."""

    def learn(self, trial_id: str, row: Mapping[str, Any]) -> None:
        """Learn of a trial that ended."""


class Rule(Protocol):
    """Ends a search before its trials are used up."""

    def tell(self, trial_id: str, row: Mapping[str, Any]) -> None:
        """Learn of a trial that ended."""

    @property
    def ended(self) -> str | None:
        """The reason to propose no more, or None."""

    @property
    def at_end(self) -> str | None:
        """What to say when all trials were used up without it."""


class InOrder:
    """The pool's order, or, with a seed, one of all orders by chance."""

    def __init__(self, ids: Sequence[str], seed: int | None = None) -> None:
        order = range(len(ids)) if seed is None else np.random.default_rng(seed).permutation(len(ids))
        self._rank = {ids[i]: rank for rank, i in enumerate(order)}

    def choose(self, left: Sequence[str]) -> str:
        """The first of the order."""
        return min(left, key=self._rank.__getitem__)

    def learn(self, trial_id: str, row: Mapping[str, Any]) -> None:
        """Nothing: results do not change the order."""


class PoolSearch:
    """A search (tune_spaces.search.Search).

    Args:
        ids: of the pool's trials, in order.
        chooser: which is next.
        budget: the most trials that run; dropped ones do not count, those told of a former process do.
        rules: each may end the search.
    """

    def __init__(self, ids: Sequence[str], chooser: Chooser, *, budget: int, rules: Sequence[Rule] = ()) -> None:
        self._left = dict.fromkeys(ids)
        self._chooser, self._rules = chooser, tuple(rules)
        self._budget = budget
        self._running: set[str] = set()
        self._told: set[str] = set()

    def propose(self) -> str | None:
        """The trial to run next; None: the budget or the pool is used up, or a rule has ended the search."""
        if self._budget < 1 or not self._left or any(rule.ended for rule in self._rules):
            return None
        trial_id = self._chooser.choose(tuple(self._left))
        del self._left[trial_id]
        self._running.add(trial_id)
        self._budget -= 1
        return trial_id

    def tell(self, trial_id: str, row: Mapping[str, Any]) -> None:
        """Learn of a trial that ended; a second time of the same one is ignored."""
        if trial_id in self._told:
            return
        self._told.add(trial_id)
        was_proposed, is_dropped = trial_id in self._running, status_of(row) == "dropped"
        self._running.discard(trial_id)
        self._left.pop(trial_id, None)
        self._budget += int(is_dropped) - int(not was_proposed)
        self._chooser.learn(trial_id, row)
        for rule in self._rules:
            rule.tell(trial_id, row)

    @property
    def ended(self) -> str | None:
        """Why nothing more is proposed: a rule's words, or, when all was used up and has ended, what it says then."""
        for rule in self._rules:
            if (words := rule.ended) is not None:
                return words
        if self._running or (self._budget > 0 and self._left):
            return None
        return next((words for rule in self._rules if (words := rule.at_end) is not None), None)
