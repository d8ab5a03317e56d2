"""Trials on Ray Tune: which of them, in how many slots, ended early by what."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import HyperBandScheduler, PopulationBasedTraining
from ray.tune.stopper import CombinedStopper

from hamu.cli.ray_environment import tune_folder
from hamu.storage import mount
from hamu.storage.mount import is_url
from hamu.training.config import TrainConfig
from hamu.training.ray_workers import WorkerSettings, free_placement_groups
from launch.follow import Follow
from launch.interfaces import use_interface_of_node
from launch.machine import Slots
from launch.pairing import Pairing
from launch.proposals import Proposals
from launch.results import SweepFolder
from launch.scheduling import settings_of
from launch.shared import Shared
from launch.standing import has_ended
from launch.states import drop_states
from launch.trainable import UnlearningTrial, trial_config
from tune_spaces.stoppers import StoppingCriterionStopper

PAUSING = (HyperBandScheduler, PopulationBasedTraining)
_DRIVER_CPUS = 0.001
"""What Tune's process of a split trial holds: Tune allows no less. Its workers leave as much of a core to it."""


def run_on_tune(
    shared: Shared,
    todo: Sequence[str],
    slots: Slots,
    follow: Follow,
    *,
    proposals: Proposals | None = None,
    scheduler: Any = None,
    stopper: tune.Stopper | None = None,
    adjustable: Sequence[str] = (),
    trial: type[UnlearningTrial] = UnlearningTrial,
) -> None:
    """Run trials on the Ray that this process has joined; then complete those that were stopped while no slot had them.

    Args:
        shared: what the slots are given.
        todo: ids of the trials that may run.
        slots: how many at once, on what.
        follow: is told what happens to them.
        proposals: says which of `todo` run, and in which order. Default: all of them, in theirs. Not with a scheduler that pauses
            trials, which has to know all of them.
        scheduler, stopper: of Tune. They see `step`, `status`, `stop_reason` and the scheduler's metric; `said_of` gives
            all that the trial said.
        adjustable: settings that the scheduler may change; it begins with the plan's.
        trial: what Tune runs.
    """
    _quieten_tune()
    folder = SweepFolder(Path(shared.folder))
    for trial_id in todo:
        _forget_stopped(folder, trial_id)
    own = {trial_id: _adjusted(shared.plan.configs[trial_id], adjustable) for trial_id in todo} if adjustable else {}
    stoppers = CombinedStopper(StoppingCriterionStopper(), *([stopper] if stopper else []))
    with _scratch_of(shared):
        if isinstance(scheduler, PAUSING):
            assert proposals is None, "a scheduler that pauses trials knows them all"
            configs = [trial_config(trial_id, own.get(trial_id, {})) for trial_id in todo]
            _run_trials(trial, shared, slots, follow, stopper=stoppers, scheduler=scheduler, **_all_at_once(configs, slots))
        else:
            assert proposals is None or not adjustable, "proposals configure their trials themselves"
            chosen = proposals or Proposals(todo, configure=lambda trial_id: trial_config(trial_id, own.get(trial_id, {})))
            _run_trials(trial, shared, slots, follow, stopper=stoppers, scheduler=scheduler, **_one_by_one(chosen, slots))
        if stopped := follow.to_complete():
            rest = Proposals(list(stopped), configure=lambda trial_id: trial_config(trial_id, stopped[trial_id], is_stopped=True))
            _run_trials(trial, shared, slots, follow, **_one_by_one(rest, slots))
    for trial_id in todo:
        drop_states(folder.trial(trial_id))


@contextlib.contextmanager
def _scratch_of(shared: Shared) -> Iterator[None]:
    """Remove what Ray has left in the sweep's folder; in a store it lies where nobody reads it."""
    try:
        yield
    finally:
        if shared.scratch and not is_url(shared.scratch):
            shutil.rmtree(shared.scratch, ignore_errors=True)


def worker_settings(slots: Slots, pairing: Pairing) -> WorkerSettings | None:
    """The processes of a slot whose trials are split; None where they are not."""
    if not pairing.is_split:
        return None
    timeout = {} if pairing.timeout_s is None else {"timeout_s": pairing.timeout_s}
    return WorkerSettings(
        n_workers=pairing.n_workers,
        cpus_per_worker=slots.cpus_per_worker - 10 * _DRIVER_CPUS,
        gpus_per_worker=slots.gpus_per_worker,
        backend=slots.backend,
        n_threads=slots.cpus_per_worker,
        prepare=use_interface_of_node,
        **timeout,
    )


def _quieten_tune() -> None:
    """What happens to the trials is told by `Follow`; Tune's words on its own files and processes would break the table."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)


def _one_by_one(proposals: Proposals, slots: Slots) -> dict[str, Any]:
    """How Tune is given trials as slots become free."""
    how = tune.TuneConfig(search_alg=proposals, num_samples=proposals.budget, max_concurrent_trials=slots.count, **_OF_ALL)
    return {"tune_config": how, "param_space": {}, "more": {}}


def _all_at_once(configs: Sequence[Mapping[str, Any]], slots: Slots) -> dict[str, Any]:
    """How Tune is given all trials before the first one begins.

    It must not be told then how many may run. A share of Ray's count of memory, which nothing else here asks for, keeps the
    others waiting.
    """
    of_trial = {config["trial_id"]: config for config in configs}
    names = dict.fromkeys(name for config in configs for name in config if name != "trial_id")
    space = {
        "trial_id": tune.grid_search(list(of_trial)),
        **{name: tune.sample_from(functools.partial(_setting_of, of_trial, name)) for name in names},
    }
    return {"tune_config": tune.TuneConfig(**_OF_ALL), "param_space": space, "more": {"memory": _memory_share(slots)}}


def _run_trials(
    trial: type[UnlearningTrial],
    shared: Shared,
    slots: Slots,
    follow: Follow,
    *,
    tune_config: tune.TuneConfig,
    param_space: Mapping[str, Any],
    more: Mapping[str, Any],
    stopper: tune.Stopper | None = None,
    scheduler: Any = None,
) -> None:
    own = {"cpu": _DRIVER_CPUS} if shared.workers else {"cpu": slots.cpus_per_trial, "gpu": slots.gpus_per_trial}
    tune_config.scheduler = scheduler
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, shared=shared, told=_metrics_of(scheduler)), {**own, **more}),
        param_space=dict(param_space),
        tune_config=tune_config,
        run_config=tune.RunConfig(
            name=f"trials-{uuid.uuid4().hex[:8]}",
            storage_path=shared.scratch or str(tune_folder()),
            stop=stopper,
            failure_config=tune.FailureConfig(max_failures=-1),  # whether a trial is tried again is decided by its attempts
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            callbacks=[follow],
            verbose=0,
        ),
    )
    tuner.fit()
    if shared.workers:
        free_placement_groups()


def _metrics_of(scheduler: Any) -> tuple[str, ...]:
    """What a scheduler goes by, beside the step."""
    return (scheduler.metric,) if getattr(scheduler, "metric", None) else ()


def _memory_share(slots: Slots) -> int:
    nodes = [int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]]
    return min(sum(nodes) // slots.count, min(filter(None, nodes)))


def _adjusted(config: TrainConfig, names: Sequence[str]) -> dict[str, Any]:
    flat = settings_of(config)
    return {name: flat[name] for name in names}


def _forget_stopped(folder: SweepFolder, trial_id: str) -> None:
    """Remove the row of a trial that a scheduler stopped and nobody completed: it is run again."""
    row = folder.row(trial_id)
    if row.get("status") == "pruned" and not has_ended(row):
        mount.remove(folder.trial(trial_id) / "row.json")


def _setting_of(of_trial: Mapping[str, Mapping[str, Any]], name: str, spec: Any) -> Any:
    return of_trial[spec.config.trial_id].get(name)


def _name_of(trial: Any) -> str:
    return str(trial.config["trial_id"])


_OF_ALL: dict[str, Any] = {"reuse_actors": True, "trial_name_creator": _name_of, "trial_dirname_creator": _name_of}
