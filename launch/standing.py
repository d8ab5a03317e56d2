"""How far a sweep has come: the trials that ended, those that it may still run, the models to compare with that it lacks.

Free of torch and Ray, so that a dry run can say it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hamu.storage.mount import shown
from launch.plan import Plan
from tune_spaces.search import SearchSettings

_Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Trials of a sweep.

    n_ended: ran, and need not run again. n_dropped: found infeasible, never run. n_left: may still run.
    """

    n_ended: int
    n_dropped: int
    n_left: int

    @property
    def n_total(self) -> int:
        """Trials that will have run in all. Dropped ones are no part of it: a search takes others in their place."""
        return self.n_ended + self.n_left


def standing(plan: Plan, rows: Mapping[str, _Row], out: Iterable[str] = ()) -> Standing:
    """Count a plan's trials.

    Args:
        rows: of the trials that ended, by id; those of other plans do not count.
        out: ids of trials that cannot be run now.
    """
    own = {trial.trial_id: rows[trial.trial_id] for trial in plan.trials if trial.trial_id in rows}
    dropped = {trial_id for trial_id, row in own.items() if row.get("status") == "dropped"}
    ended = {trial_id for trial_id, row in own.items() if has_ended(row)} - dropped
    n_pool = len(plan.trials) - len(dropped.union(out) - ended)
    return Standing(n_ended=len(ended), n_dropped=len(dropped), n_left=max(0, min(plan.n_to_run, n_pool) - len(ended)))


def has_ended(row: _Row) -> bool:
    """Whether a trial's row says that it need not run again.

    A pruned trial has ended when its model is kept; until then its row only says that a scheduler has stopped it. A dropped one
    was found infeasible before it ran.
    """
    return row.get("status") in ("finished", "dropped") or (row.get("status") == "pruned" and bool(row.get("model_path")))


def is_searched(settings: SearchSettings) -> bool:
    """Whether a search chooses among the trials of a plan; else all of them run, in the plan's order."""
    return settings.name != "grid" or settings.until is not None or bool(settings.target) or settings.trials is not None


def lacking_references(plan: Plan, known: Mapping[str, _Row], trial_ids: Iterable[str]) -> list[str]:
    """Keys of the retain-only models that some trials are to be compared with and that are not there (not yet, or they failed).

    Args:
        known: what references.json holds.
        trial_ids: the trials.
    """
    wanted = set(trial_ids)
    keys = dict.fromkeys(
        str(trial.reference) for trial in plan.trials if trial.trial_id in wanted and trial.reference is not None
    )
    return [key for key in keys if not known.get(key, {}).get("result")]


def left_words(plan: Plan, stand: Standing) -> str:
    """How many trials are to run, for the first line of a sweep."""
    how = "the target" if plan.search.target else plan.search.name
    pool = f" (of {len(plan.trials)}, picked by {how})" if plan.n_to_run < len(plan.trials) else ""
    dropped = f", {stand.n_dropped} dropped before" if stand.n_dropped else ""
    return f"{stand.n_left} of {stand.n_total} trials to run{pool}{dropped}"


def resume_command(plan: Plan) -> str:
    """What goes on with a sweep."""
    place = "" if plan.root == Path("artifacts") else f" --storage-path {shown(plan.root)}"
    return f"python launch/sweep.py --resume {plan.name}{place}"
