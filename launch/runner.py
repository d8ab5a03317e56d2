"""Runs a plan on Ray Tune: the originals first, then every trial in warm slots, then the report."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import HyperBandScheduler, PopulationBasedTraining
from ray.tune.stopper import CombinedStopper

from hamu.cli.ray_environment import ray_folder, token_hint, tune_folder
from hamu.hub import MODEL, fetch_model, is_cached, offline_environment
from hamu.tasks.catalog import modality_of
from hamu.training.config import TrainConfig
from hamu.training.ray_workers import WorkerSettings, free_placement_groups, local_ray
from launch.checks import check_forget_sets, is_on_hub
from launch.follow import MAX_FAILURES, Follow
from launch.live import Board
from launch.machine import Machine, Slots
from launch.originals import provide_originals
from launch.pairing import Pairing, pairing_of
from launch.plan import Plan
from launch.results import SweepFolder, has_ended
from launch.shared import Shared
from launch.signals import Signals
from launch.states import drop_states
from launch.summary import write_summary
from launch.trainable import UnlearningTrial, trial_config
from launch.words import Words
from tune_spaces.stoppers import StoppingCriterionStopper

_DRIVER_CPUS = 0.001
"""What Tune's process of a split trial holds: Tune allows no less. Its workers leave as much of a core to it."""


def run_sweep(
    plan: Plan,
    folder: SweepFolder,
    *,
    slots: Slots,
    machine: Machine,
    words: Words,
    signals: Signals,
    dashboard: bool = False,
    scheduler: Any = None,
    stopper: tune.Stopper | None = None,
    adjustable: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the trials of a plan that have not finished, and write the results; call it while holding the folder's lease.

    Args:
        plan: what to run.
        folder: its results folder, started.
        slots, machine: how many trials at once, on what.
        words: where progress is told.
        signals: looked at several times a second.
        dashboard: start Ray's.
        scheduler: of Tune, to stop, pause or change trials; by the column "step". Default: every trial runs to its end.
        stopper: of Tune, beside HAMU's criterion.
        adjustable: settings that the scheduler may change; it begins with the plan's.

    Returns:
        The summary, as in summary.json.

    Raises:
        HamuError: the data or the original cannot be had.
        Interrupted: a signal came; what has finished is kept.
    """
    todo = folder.unfinished(plan)
    if todo:
        plan = replace(plan, root=plan.root.resolve())  # workers have a working directory of their own
        signals.check()
        data = {key: modality_of(config).load_data(config) for key, config in plan.datasets().items()}
        check_forget_sets(plan, data)
        bring_models(plan.configs.values(), words)
        sizes = {key: item.n_bytes for key, item in data.items()}
        started = time.monotonic()
        with contextlib.ExitStack() as session:
            with words.busy("starting Ray"):
                cpus = max(machine.cpus, slots.count * slots.cpus_per_trial)
                ray_of_our_own = local_ray(
                    cpus=cpus,
                    gpus=machine.gpus,
                    shared_bytes=sum(sizes.values()),
                    dashboard=dashboard,
                    folder=session.enter_context(ray_folder()),
                )
                address = session.enter_context(ray_of_our_own)
                signals.install()  # Ray has taken SIGTERM
                signals.check()
            board_at = f", dashboard at {address}{token_hint()}" if address else ""
            words.say(f"Ray started in {time.monotonic() - started:.1f} s{board_at}")
            references = {key: ray.put(item) for key, item in data.items()}
            originals = provide_originals(
                plan, todo, references, sizes, slots=slots, machine=machine, words=words, signals=signals, pins=folder.originals
            )
            shared = Shared(
                plan=plan,
                folder=str(folder.path.resolve()),
                data=references,
                originals=originals,
                device="cuda" if slots.gpus_per_trial else "cpu",
                n_threads=slots.cpus_per_worker,
                run_id=uuid.uuid4().hex[:12],
                workers=_worker_settings(slots, pairing_of(plan)),
            )
            with Board(plan, words.console, n_ended=len(plan.trials) - len(todo)) as board:
                follow = Follow(plan, folder, board, signals)
                run_on_tune(shared, todo, slots, follow, scheduler=scheduler, stopper=stopper, adjustable=adjustable)
    return write_summary(plan, folder, slots=slots, machine=machine)


def bring_models(configs: Iterable[TrainConfig], words: Words) -> None:
    """Fetch the models of the hub that are not in the cache; the processes that Ray starts then use the cache alone.

    Raises:
        CheckpointError: one cannot be had.
    """
    on_hub = {(config.run.model_name, config.run.model_revision) for config in configs if is_on_hub(config)}
    for name, revision in on_hub:
        if not is_cached(name, revision, MODEL):
            with words.busy(f"fetching {name}"):
                fetch_model(name, revision)
    if on_hub:
        os.environ.update(offline_environment())


def run_on_tune(
    shared: Shared,
    todo: Sequence[str],
    slots: Slots,
    follow: Follow,
    *,
    scheduler: Any = None,
    stopper: tune.Stopper | None = None,
    adjustable: Sequence[str] = (),
) -> None:
    """Run trials on the Ray that this process has joined; then complete those that were stopped while no slot had them.

    Args: as of `run_sweep`.
    """
    folder = SweepFolder(Path(shared.folder))
    for trial_id in todo:
        _forget_stopped(folder, trial_id)
    planned = {trial_id: _adjusted(shared.plan.configs[trial_id], adjustable) for trial_id in todo}
    stoppers = CombinedStopper(StoppingCriterionStopper(), *([stopper] if stopper else []))
    _run_trials(shared, [trial_config(*each) for each in planned.items()], slots, follow, stopper=stoppers, scheduler=scheduler)
    if stopped := [trial_config(*each, is_stopped=True) for each in follow.to_complete().items()]:
        _run_trials(shared, stopped, slots, follow)
    for trial_id in todo:
        drop_states(folder.trial(trial_id))


def _run_trials(
    shared: Shared,
    configs: Sequence[Mapping[str, Any]],
    slots: Slots,
    follow: Follow,
    *,
    stopper: tune.Stopper | None = None,
    scheduler: Any = None,
) -> None:
    # What happens to the trials is told by `follow`; Tune's words on its own files and processes would break the table.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    resources = {"cpu": _DRIVER_CPUS} if shared.workers else {"cpu": slots.cpus_per_trial, "gpu": slots.gpus_per_trial}
    is_pausing = isinstance(scheduler, (HyperBandScheduler, PopulationBasedTraining))
    if is_pausing:
        # It has to know all its trials, so Tune must not be told how many may run. A share of Ray's count of memory, which
        # nothing else here asks for, keeps the others waiting.
        resources["memory"] = _memory_share(slots)
    of_trial = {config["trial_id"]: config for config in configs}
    names = dict.fromkeys(name for config in configs for name in config if name != "trial_id")
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(UnlearningTrial, shared=shared), resources),
        param_space={
            "trial_id": tune.grid_search(list(of_trial)),
            **{name: tune.sample_from(functools.partial(_setting_of, of_trial, name)) for name in names},
        },
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            max_concurrent_trials=None if is_pausing else slots.count,
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
            scheduler=scheduler,
        ),
        run_config=tune.RunConfig(
            name=f"trials-{uuid.uuid4().hex[:8]}",
            storage_path=str(tune_folder()),
            stop=stopper,
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            callbacks=[follow],
            verbose=0,
        ),
    )
    tuner.fit()
    if shared.workers:
        free_placement_groups()


def _worker_settings(slots: Slots, pairing: Pairing) -> WorkerSettings | None:
    if not pairing.is_split:
        return None
    timeout = {} if pairing.timeout_s is None else {"timeout_s": pairing.timeout_s}
    return WorkerSettings(
        n_workers=pairing.n_workers,
        cpus_per_worker=slots.cpus_per_worker - 10 * _DRIVER_CPUS,
        gpus_per_worker=slots.gpus_per_worker,
        backend=slots.backend,
        n_threads=slots.cpus_per_worker,
        **timeout,
    )


def _memory_share(slots: Slots) -> int:
    nodes = [int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]]
    return min(sum(nodes) // slots.count, min(filter(None, nodes)))


def _adjusted(config: TrainConfig, names: Sequence[str]) -> dict[str, Any]:
    flat = config.to_flat() | {"learning_rate": config.lr, "constraint_ratio": config.constraint_ratio}
    return {name: flat[name] for name in names}


def _forget_stopped(folder: SweepFolder, trial_id: str) -> None:
    """Remove the row of a trial that a scheduler stopped and nobody completed: it is run again."""
    row = folder.rows().get(trial_id, {})
    if row.get("status") == "pruned" and not has_ended(row):
        (folder.trial(trial_id) / "row.json").unlink()


def _setting_of(of_trial: Mapping[str, Mapping[str, Any]], name: str, spec: Any) -> Any:
    return of_trial[spec.config.trial_id].get(name)


def _name_of(trial: Any) -> str:
    return str(trial.config["trial_id"])
