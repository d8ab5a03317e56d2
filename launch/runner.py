"""Runs a plan on Ray: the originals first, then the trials in warm slots, then the report."""

from __future__ import annotations

import functools
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from hamu.cli.security import secret_names
from hamu.errors import LeaseError
from hamu.storage.lease import Lease
from hamu.storage.mount import shown, url_of
from launch.attempts import begun_among
from launch.follow import Follow
from launch.left_out import without_dropped, without_failed
from launch.live import Board
from launch.machine import Machine, Slots, fit_slots, fit_text, memory_cap
from launch.on_tune import run_on_tune, worker_settings
from launch.pairing import pairing_of
from launch.part import Part
from launch.plan import Plan
from launch.probe import Probe, saved_text
from launch.proposals import Proposals, open_search, view_for, write_search
from launch.ready import Ready, Surroundings, ready_on_ray
from launch.repair import repair
from launch.results import SweepFolder, write_json
from launch.runs import Runs
from launch.scheduling import check_schedule
from launch.shared import Shared
from launch.signals import Signals
from launch.standing import has_ended, is_searched, lacking_references, standing
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
    is_joined: bool = False,
    lease: Lease | None = None,
    whole: Plan | None = None,
    part: Part | None = None,
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
        prune_infeasible: drop the trials that none of the pairs allows; measures as many as is usual where `n_probe` is None.
        is_joined: the Ray is a cluster that this process has joined.
        lease: of the folder; a process that has lost it stops.
        whole: the plan of the sweep that the summary is of, where this is a share of it; part: which.

    Returns:
        The summary, as in summary.json.

    Raises:
        HamuError: the data cannot be had, or the trials do not suit the scheduler.
        Interrupted: a signal came; what has finished is kept.
    """
    check_schedule(plan)
    around = Surroundings(slots=slots, machine=machine, words=words, signals=signals, is_joined=is_joined)
    repair(folder, plan, words.say)
    todo = [] if _has_run_out(plan, folder, words) else folder.unfinished(plan)
    if not todo:
        _complete_references(plan, folder, around, dashboard=dashboard)
    else:
        with ready_on_ray(plan, todo, folder, around, dashboard=dashboard, wants_memory=fit_gpus) as ready:
            provided = ready.provided
            todo = without_failed(plan, todo, folder, provided.failed, words)
            if is_searched(plan.search):
                provided.references.wait()  # it may go by them
            probe = None
            if todo and (n_probe is not None or prune_infeasible):
                probe = ready.probe(todo, around, n_probe)
                write_json(folder.probe_path, probe.to_json())
                if prune_infeasible:
                    todo = without_dropped(plan, todo, folder, probe.dropped, words)
            if fit_gpus:
                slots = fit_slots(slots, machine, provided.memory_bytes)
                words.say(fit_text(slots, machine, provided.memory_bytes))
            around = replace(around, slots=slots)
            _run_trials(ready, todo, folder, around, stopper=stopper, lease=lease, part=part)
            if again := repair(folder, plan, words.say):  # found broken as soon as they had ended: a disk to look at
                _run_trials(ready, again, folder, around, stopper=stopper, lease=lease, part=part)
            provided.references.wait()
            if probe is not None and prune_infeasible and (saved := saved_text(probe, list(folder.rows().values()))):
                words.say(saved)
    return write_summary(whole or plan, folder, slots=slots, machine=machine)


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
            todo = without_failed(plan, todo, folder, ready.provided.failed, words)
            return ready.probe(todo, around, n_probe)


def _has_run_out(plan: Plan, folder: SweepFolder, words: Words) -> bool:
    """Whether the search of a resumed sweep proposes nothing more, which is then said."""
    rows = folder.rows()
    if not is_searched(plan.search) or not rows:
        return False
    n_left = standing(plan, rows).n_left
    pool = [trial.trial_id for trial in plan.trials if rows.get(trial.trial_id, {}).get("status") != "dropped"]
    if n_left and lacking_references(plan, folder.references(), pool):
        return False  # it goes by models that have still to be trained
    why = open_search(plan, folder).ended
    if why is not None and folder.search_state().get("ended") is None:  # the process that found out was killed
        write_search(folder, view=view_for(plan, folder), ended=why)
    if why is None and not n_left:
        why = f"all {plan.n_to_run} trials that the search may try have ended"
    if why is None:
        return False
    words.say(f"the search is over: {why}")
    return True


def _complete_references(plan: Plan, folder: SweepFolder, around: Surroundings, *, dashboard: bool) -> None:
    """Make the retain-only models that trials which ran still lack; those that failed are tried again."""
    ran = [trial_id for trial_id, row in folder.rows().items() if has_ended(row) and row["status"] != "dropped"]
    lacking = set(lacking_references(plan, folder.references(), ran))
    if not lacking:
        return
    around.words.say(f"no trial is left to run; retain-only models that trials have still to be compared with: {len(lacking)}")
    trials = (trial if trial.reference in lacking else replace(trial, reference=None) for trial in plan.trials)
    with ready_on_ray(replace(plan, trials=tuple(trials)), [], folder, around, dashboard=dashboard) as ready:
        ready.provided.references.wait()
    if is_searched(plan.search):  # its last words may be others now
        write_search(folder, view=view_for(plan, folder), ended=open_search(plan, folder).ended)


def _scratch(folder: SweepFolder, run_id: str) -> str:
    """Where Ray's own files of a run lie when there are several nodes, which share no other place."""
    name = f".ray-{run_id}"
    return f"{url}/{name}" if (url := url_of(folder.path)) else str((folder.path / name).resolve())


_UNREACHABLE_S = 60.0


class _LeaseLost(BaseException):
    """Another process has the folder. Not an `Exception`, so that Tune lets it pass."""


def _run_trials(
    ready: Ready,
    todo: Sequence[str],
    folder: SweepFolder,
    around: Surroundings,
    *,
    stopper: tune.Stopper | None,
    lease: Lease | None,
    part: Part | None,
) -> None:
    """Run those of the trials that the search chooses."""
    plan, provided, slots = ready.plan, ready.provided, around.slots
    proposals = None
    original_of = {trial.trial_id: trial.original for trial in plan.trials}
    out = {trial_id for trial_id in folder.unfinished(plan) if original_of[trial_id] in provided.failed}
    stand = standing(plan, folder.rows(), out)
    say_how = functools.partial(write_search, folder, view=view_for(plan, folder, out), n_left_out=len(out))
    if is_searched(plan.search):
        begun = begun_among(folder.trials, todo)
        proposals = Proposals(begun, open_search(plan, folder, out), budget=stand.n_left)
        say_how(ended=proposals.ended)
        if proposals.ended is not None:  # as the retain-only models tell that were made since
            around.words.say(f"the search is over: {proposals.ended}")
            return
    if not stand.n_left:
        return
    run_id = uuid.uuid4().hex[:12]
    shared = Shared(
        plan=plan,
        folder=str(folder.path.resolve()),
        data=ready.data,
        originals=provided.originals,
        device="cuda" if slots.gpus_per_trial else "cpu",
        n_threads=slots.cpus_per_worker,
        run_id=run_id,
        workers=worker_settings(slots, pairing_of(plan)),
        gpu_share=memory_cap(slots, around.machine),
        retain_references=provided.references.folders(),
        notices=ready.notices.actor,
        secret_names=secret_names(),
        scratch=_scratch(folder, run_id) if len(around.machine.nodes) > 1 else "",
    )
    board_of = Board(plan, around.words.console, n_ended=stand.n_ended, n_trials=stand.n_total)

    unreachable: list[float] = []

    def poll() -> None:
        provided.references.poll()
        try:
            if lease is not None:
                lease.check()
            unreachable.clear()
        except LeaseError as error:
            raise _LeaseLost(error) from error
        except OSError as error:  # of a network folder that is away for a moment
            unreachable.append(time.monotonic())
            if unreachable[-1] - unreachable[0] > _UNREACHABLE_S:
                raise _LeaseLost(LeaseError(f"{shown(folder.path)} cannot be reached ({error}); resume when it can")) from error

    with Runs(folder.runs_of(None if part is None else part.name)) as runs, board_of as board:
        tell = proposals.tell if proposals else None
        follow = Follow(
            plan, folder, board, around.signals, tell=tell, poll=poll, runs=runs, watch=ready.watch(around), notices=ready.notices
        )
        try:
            run_on_tune(
                shared, todo, slots, follow, proposals=proposals,
                scheduler=ready.schedule.scheduler, stopper=stopper, adjustable=ready.schedule.adjustable,
            )  # fmt: skip
        except _LeaseLost as lost:
            raise lost.args[0] from None
        finally:
            for line in ready.notices.last_lines():
                board.say(line)
    if proposals is not None:
        say_how(ended=proposals.ended, n_proposed=proposals.n_given)
