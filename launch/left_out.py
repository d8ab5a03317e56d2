"""Trials of a plan that do not run: their original failed, or a probe found them infeasible. Each gets a row that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from launch.follow import write_row
from launch.plan import Plan
from launch.results import SweepFolder
from launch.shared import failed_row, identity
from launch.words import Words


def without_failed(plan: Plan, todo: Sequence[str], folder: SweepFolder, failed: Mapping[str, str]) -> list[str]:
    """Give the trials whose original is there; the others fail, and are tried again by a resumed sweep.

    Args:
        plan, todo: the trials, and ids of those that may run.
        folder: gets a row for each that fails.
        failed: why there is no original, by key.
    """
    trials = {trial.trial_id: trial for trial in plan.trials}
    for trial in map(trials.__getitem__, todo):
        if trial.original in failed:
            write_row(folder, trial.trial_id, failed_row(plan, trial, failed[trial.original]))
    return [trial_id for trial_id in todo if trials[trial_id].original not in failed]


def without_dropped(plan: Plan, todo: Sequence[str], folder: SweepFolder, dropped: Mapping[str, str], words: Words) -> list[str]:
    """Give the trials that a probe found feasible; the others are dropped for good.

    Args: as of `without_failed`; dropped: why, by trial id. words: is told how many; what was measured has named them.
    """
    trials = {trial.trial_id: trial for trial in plan.trials}
    if out := list(filter(dropped.__contains__, todo)):
        words.say(f"dropped, and not run: {', '.join(out)}")
    for trial_id in out:
        own = {"status": "dropped", "message": dropped[trial_id], "steps": 0, "config": json.dumps(dict(trials[trial_id].config))}
        # It never ran, so it has no times.
        write_row(folder, trial_id, {**identity(plan, trials[trial_id]), **own, "started_at": None, "ended_at": None})
    return [trial_id for trial_id in todo if trial_id not in dropped]
