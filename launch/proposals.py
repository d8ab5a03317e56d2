"""What a search proposes, handed to Ray Tune one trial of the plan after another: a Tune `Searcher` over a `Search`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.tune.search import Searcher

from hamu.reports.views import View, view_of
from launch.plan import Plan
from launch.results import SweepFolder, write_json
from launch.scheduling import settings_of
from launch.standing import has_ended
from launch.trainable import trial_config
from tune_spaces.search import Search, make_search


def as_planned(trial_id: str) -> dict[str, Any]:
    """Tune's configuration of a trial without settings of its own."""
    return trial_config(trial_id, {})


class Proposals(Searcher):
    """The trials that Tune is to run, by the ids of the plan.

    Those of `first` come first, then what the search proposes; `tell` passes on how a trial ended, before Tune asks for the next.

    Args:
        first: ids, in order.
        search: None: no other trials than those.
        budget: trials to run at most; default: those of `first`.
        configure: gives Tune's configuration of a trial; default: as the plan has it.
    """

    def __init__(
        self,
        first: Sequence[str],
        search: Search | None = None,
        *,
        budget: int | None = None,
        configure: Callable[[str], dict[str, Any]] = as_planned,
    ) -> None:
        super().__init__()
        self._first, self._search, self._configure = list(reversed(first)), search, configure
        self._given: set[str] = set(first)
        self._running: set[str] = set()
        self.budget = len(first) if budget is None else budget
        """Trials to run at most."""
        self.n_given = 0
        """Trials that Tune was given."""

    def suggest(self, trial_id: str) -> Any:
        """Give the configuration of the next trial (`trial_id` is Tune's own name for it), None for now, or `FINISHED`."""
        ours = self._next()
        if ours is None:  # what runs may still change the search's mind
            return None if self._running else Searcher.FINISHED
        self._running.add(trial_id)
        self.n_given += 1
        return self._configure(ours)

    def _next(self) -> str | None:
        if self.n_given >= self.budget:
            return None
        if self._first:
            return self._first.pop()
        while self._search is not None and (proposed := self._search.propose()) is not None:
            if proposed not in self._given:  # it may not know of those that came first
                self._given.add(proposed)
                return proposed
        return None

    def tell(self, trial_id: str, row: Mapping[str, Any]) -> None:
        """Say how a trial of the plan ended."""
        if self._search is not None:
            self._search.tell(trial_id, row)

    @property
    def ended(self) -> str | None:
        """Why the search proposes no more trials though some are left, in words."""
        return None if self._search is None else self._search.ended

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial no longer runs; its row is told by `tell`."""
        self._running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep resumes from its trials' rows."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: a sweep resumes from its trials' rows."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a sweep resumes from its trials' rows."""


def open_search(plan: Plan, folder: SweepFolder, out: Iterable[str] = ()) -> Search:
    """Make the plan's search over its trials, and tell it of those that ended before, in the order in which they did.

    Args:
        out: ids of trials that cannot be run, and that it must not propose.
    """
    rows, out = folder.rows(), set(out)
    left_out = {*out, *(trial_id for trial_id, row in rows.items() if row.get("status") == "dropped")}
    pool = {trial_id: settings_of(config) for trial_id, config in plan.configs.items() if trial_id not in left_out}
    settings = replace(plan.search, trials=min(plan.n_to_run, len(pool))) if pool else plan.search
    search = make_search(settings, pool, view=view_for(plan, folder, out))
    ended = [row["trial_id"] for row in rows.values() if has_ended(row) and row["trial_id"] in pool]
    for row in folder.compared_rows(sorted(ended, key=lambda trial_id: rows[trial_id].get("ended_at") or 0.0)):
        search.tell(row["trial_id"], row)
    return search


def view_for(plan: Plan, folder: SweepFolder, out: Iterable[str] = ()) -> View:
    """The axes that a search goes by: by the rule of the report (`view_of`), with the trials that have still to run as well.

    out: ids of trials that cannot be run.
    """
    rows, known, left_out = folder.rows(), folder.references(), set(out)
    to_come = [
        trial.reference is not None and bool(known.get(trial.reference, {}).get("result"))
        for trial in plan.trials
        if trial.trial_id not in left_out and not has_ended(rows.get(trial.trial_id, {}))
    ]
    return view_of(folder.compared_rows(), to_come=to_come)


def write_search(folder: SweepFolder, *, view: View, ended: str | None = None, n_proposed: int = 0, n_left_out: int = 0) -> None:
    """Keep how a search stands.

    Args:
        view: the axes that it goes by.
        ended: why no more trials are proposed.
        n_proposed: how many were in this run of the sweep.
        n_left_out: trials that it could not choose, as their original failed.
    """
    write_json(folder.search_path, {"ended": ended, "proposed": n_proposed, "view": view.name, "left_out": n_left_out})
