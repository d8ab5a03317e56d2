"""Trials of a plan that do not run: their original failed, or a probe found them infeasible. Most get a row that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from hamu.storage import mount
from launch.attempts import begun_among
from launch.follow import write_row
from launch.plan import Plan
from launch.results import SweepFolder
from launch.shared import failed_row, identity
from launch.standing import is_searched
from launch.words import Words

_NEVER_RAN = {"started_at": None, "ended_at": None}


def without_failed(plan: Plan, todo: Sequence[str], folder: SweepFolder, failed: Mapping[str, str], words: Words) -> list[str]:
    """Give the trials whose original is there; the others are tried again by a resumed sweep.

    They fail, but for those that a search has not chosen and may never choose: these are left out of what it chooses from, unless
    nothing else can be run.

    Args:
        plan, todo: the trials, and ids of those that may run.
        folder: gets a row for each that fails.
        failed: why there is no original, by key.
        words: is told how many a search cannot choose.
    """
    trials = {trial.trial_id: trial for trial in plan.trials}
    lost = [trial_id for trial_id in todo if trials[trial_id].original in failed]
    left = [trial_id for trial_id in todo if trials[trial_id].original not in failed]
    if is_searched(plan.search):
        begun, rows = set(begun_among(folder.trials, todo)), folder.rows()
        for trial_id in todo:  # of a former run in which nothing could be run
            if rows.get(trial_id, {}).get("status") == "failed" and trial_id not in begun:
                mount.remove(folder.trial(trial_id) / "row.json")
        if left:
            out = [trial_id for trial_id in lost if trial_id not in begun]
            lost = [trial_id for trial_id in lost if trial_id in begun]
            if out:
                whose = "1 trial cannot start, as its" if len(out) == 1 else f"{len(out)} trials cannot start, as their"
                words.say(f"{whose} original failed; the search chooses among the other {len(left)}")
    for trial_id in lost:
        trial = trials[trial_id]
        write_row(folder, trial_id, {**failed_row(plan, trial, failed[trial.original]), **_NEVER_RAN})
    return left


def without_dropped(plan: Plan, todo: Sequence[str], folder: SweepFolder, dropped: Mapping[str, str], words: Words) -> list[str]:
    """Give the trials that a probe found feasible; the others are dropped for good.

    Args: as of `without_failed`; dropped: why, by trial id. words: is told how many; what was measured has named them.
    """
    trials = {trial.trial_id: trial for trial in plan.trials}
    if out := list(filter(dropped.__contains__, todo)):
        words.say(f"dropped, and not run: {', '.join(out)}")
    for trial_id in out:
        own = {"status": "dropped", "message": dropped[trial_id], "steps": 0, "config": json.dumps(dict(trials[trial_id].config))}
        write_row(folder, trial_id, {**identity(plan, trials[trial_id]), **own, **_NEVER_RAN})
    return [trial_id for trial_id in todo if trial_id not in dropped]
