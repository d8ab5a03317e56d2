"""Runs a plan on Ray: the originals first, then the trials in warm slots, then the report."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from launch.follow import Follow
from launch.left_out import without_dropped, without_failed
from launch.live import Board
from launch.machine import Machine, Slots, fit_slots, memory_cap
from launch.on_tune import run_on_tune, worker_settings
from launch.pairing import pairing_of
from launch.plan import Plan
from launch.probe import N_PAIRS, Probe, saved_text
from launch.proposals import Proposals, is_searched, open_search, view_for, write_search
from launch.ready import Ready, Surroundings, ready_on_ray
from launch.results import SweepFolder, has_ended, write_json
from launch.scheduling import check_schedule
from launch.shared import Shared
from launch.signals import Signals
from launch.summary import write_summary
from launch.words import Words


def run_sweep(
    plan: Plan,
    folder: SweepFolder,
    *,
    slots: Slots,
    machine: Machine,
    words: Words,
    signals: Signals,
    dashboard: bool = False,
    stopper: tune.Stopper | None = None,
    fit_gpus: bool = False,
    n_probe: int | None = None,
    prune_infeasible: bool = False,
) -> dict[str, Any]:
    """Run the trials of a plan that have not ended, and write the results; call it while holding the folder's lease.

    Args:
        plan: what to run; its search settings say which of the trials, in which order, and what ends them early.
        folder: its results folder, started.
        slots, machine: how many trials at once, on what.
        words: where progress is told.
        signals: looked at several times a second.
        dashboard: start Ray's.
        stopper: of Tune, beside HAMU's criterion.
        fit_gpus: let as many trials share a GPU as their memory estimate allows.
        n_probe: pairs of gradients to measure first, and tell what they allow; None: none.
        prune_infeasible: drop the trials that none of the pairs allows; measures `N_PAIRS` of them where `n_probe` is None.

    Returns:
        The summary, as in summary.json.

    Raises:
        HamuError: the data cannot be had, or the trials do not suit the scheduler.
        Interrupted: a signal came; what has finished is kept.
    """
    check_schedule(plan)
    around = Surroundings(slots=slots, machine=machine, words=words, signals=signals)
    todo = folder.unfinished(plan)
    if todo and not _has_run_out(plan, folder, words):
        with ready_on_ray(plan, todo, folder, around, dashboard=dashboard, wants_memory=fit_gpus) as ready:
            plan, provided = ready.plan, ready.provided
            todo = without_failed(plan, todo, folder, provided.failed)
            if plan.references and (is_searched(plan.search) or _reads_references(plan)):
                provided.references.wait()
            probe = None
            if todo and (n_probe is not None or prune_infeasible):
                probe = ready.probe(todo, around, n_probe)
                write_json(folder.probe_path, probe.to_json())
                if prune_infeasible:
                    todo = without_dropped(plan, todo, folder, probe.dropped, words)
            if fit_gpus:
                slots = fit_slots(slots, machine, provided.memory_bytes)
                words.say(f"{slots.describe()}, by the memory that a trial should need")
            _run_trials(ready, todo, folder, replace(around, slots=slots), stopper=stopper)
            provided.references.wait()
            if probe is not None and prune_infeasible and (saved := saved_text(probe, list(folder.rows().values()))):
                words.say(saved)
    return write_summary(plan, folder, slots=slots, machine=machine)


def probe_sweep(
    plan: Plan,
    *,
    slots: Slots,
    machine: Machine,
    words: Words,
    signals: Signals,
    n_probe: int | None = None,
    dashboard: bool = False,
) -> Probe:
    """Measure what the first pairs of gradients of a plan allow, and say it.

    Originals are trained where they are missing; nothing is written among the results.

    Args: as of `run_sweep`.
    """
    around = Surroundings(slots=slots, machine=machine, words=words, signals=signals)
    plan = replace(plan, references={}, trials=tuple(replace(trial, reference=None) for trial in plan.trials))
    todo = [trial.trial_id for trial in plan.trials]
    with tempfile.TemporaryDirectory(prefix="hamu-probe-") as place:
        folder = SweepFolder(Path(place))
        folder.trials.mkdir()
        with ready_on_ray(plan, todo, folder, around, dashboard=dashboard) as ready:
            return ready.probe(without_failed(plan, todo, folder, ready.provided.failed), around, n_probe)


def _has_run_out(plan: Plan, folder: SweepFolder, words: Words) -> bool:
    """Whether the search of a resumed sweep proposes nothing more, which is then said."""
    if not is_searched(plan.search) or not folder.rows():
        return False
    if plan.references and view_for(plan, folder).name != "reference":
        return False  # it goes by models that have still to be trained
    why = open_search(plan, folder).ended
    if why is not None and folder.search_ended() is None:  # the process that found out was killed
        write_search(folder, ended=why, n_proposed=0)
    if why is None and _n_left(plan, folder, out=()) <= 0:
        why = f"all {plan.n_to_run} trials that the search may try have ended"
    if why is None:
        return False
    words.say(f"the search is over: {why}")
    return True


def _n_left(plan: Plan, folder: SweepFolder, out: Iterable[str]) -> int:
    """Trials that a search may still run; dropped ones, and those of `out`, do not count as tried."""
    rows = folder.rows()
    dropped = {trial_id for trial_id, row in rows.items() if row.get("status") == "dropped"}
    n_ended = sum(has_ended(row) for row in rows.values()) - len(dropped)
    return min(plan.n_to_run, len(plan.trials) - len(dropped.union(out))) - n_ended


def _reads_references(plan: Plan) -> bool:
    """Whether trials read the folders of retain-only models while they run."""
    return any(config.logging.eval_tofu for config in plan.configs.values())


def _run_trials(
    ready: Ready, todo: Sequence[str], folder: SweepFolder, around: Surroundings, *, stopper: tune.Stopper | None
) -> None:
    """Run those of the trials that the search chooses."""
    plan, provided, slots = ready.plan, ready.provided, around.slots
    proposals, n_all, n_left = None, len(plan.trials), len(todo)
    if is_searched(plan.search):
        may_run = set(folder.unfinished(plan))
        out = {trial.trial_id for trial in plan.trials if trial.original in provided.failed and trial.trial_id in may_run}
        n_left = _n_left(plan, folder, out)
        n_all = n_left + sum(has_ended(row) and row["status"] != "dropped" for row in folder.rows().values())
        begun = [trial_id for trial_id in todo if folder.trial(trial_id).exists()]
        proposals = Proposals(begun, open_search(plan, folder, out), budget=n_left)
    if n_left <= 0:
        return
    shared = Shared(
        plan=plan,
        folder=str(folder.path.resolve()),
        data=ready.data,
        originals=provided.originals,
        device="cuda" if slots.gpus_per_trial else "cpu",
        n_threads=slots.cpus_per_worker,
        run_id=uuid.uuid4().hex[:12],
        workers=worker_settings(slots, pairing_of(plan)),
        gpu_share=memory_cap(slots, around.machine),
        retain_references=provided.references.folders(),
    )
    with Board(plan, around.words.console, n_ended=n_all - n_left, n_trials=n_all) as board:
        follow = Follow(
            plan, folder, board, around.signals, tell=proposals.tell if proposals else None, poll=provided.references.poll
        )
        run_on_tune(
            shared, todo, slots, follow, proposals=proposals,
            scheduler=ready.schedule.scheduler, stopper=stopper, adjustable=ready.schedule.adjustable,
        )  # fmt: skip
    if proposals is not None:
        write_search(folder, ended=proposals.ended, n_proposed=proposals.n_given)
