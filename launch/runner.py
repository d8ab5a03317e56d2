"""Runs a plan on Ray Tune: the originals first, then every trial in warm slots, then the report."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import tune

from hamu.data.sources import ImageData, load_image_data
from hamu.training.config import TrainConfig
from launch.checks import check_forget_sets
from launch.live import Board
from launch.local_ray import local_ray, tune_folder
from launch.machine import Machine, Slots
from launch.originals import provide_originals
from launch.plan import Plan
from launch.results import SweepFolder, write_json
from launch.shared import Shared, failed_row
from launch.signals import Signals
from launch.summary import write_summary
from launch.trainable import UnlearningTrial
from launch.words import Words
from tune_spaces.stoppers import StoppingCriterionStopper

MAX_FAILURES = 2
"""How often a trial is started again when its process dies."""


class Follow(tune.Callback):
    """Tells the board and the results folder what happens to the trials."""

    def __init__(self, plan: Plan, folder: SweepFolder, board: Board, signals: Signals) -> None:
        self._plan, self._folder, self._board, self._signals = plan, folder, board, signals
        self._trials = {trial.trial_id: trial for trial in plan.trials}
        self._started: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks, for a way to resume that is not ours

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune looks for news, several times a second."""
        self._signals.check()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A slot has taken the trial."""
        self._started.setdefault(trial.config["trial_id"], time.time())

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """The trial has trained on."""
        self._board.update(trial.config["trial_id"], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial has ended and written its row."""
        self._end(trial.config["trial_id"], "its process said nothing of how it ended")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's process has died once too often."""
        self._end(trial.config["trial_id"], f"its process died {MAX_FAILURES + 1} times (out of memory, or killed)")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's process has died, and Tune starts another."""
        self._board.say(f"the process of {trial.config['trial_id']} died; the trial goes on from its checkpoint")

    def _end(self, trial_id: str, otherwise: str) -> None:
        path = self._folder.trial(trial_id) / "row.json"
        if not path.exists():
            times = {"started_at": self._started.get(trial_id, time.time()), "ended_at": time.time(), "train_s": 0.0}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {**failed_row(self._plan, self._trials[trial_id], otherwise), **times})
        self._board.end(json.loads(path.read_text()))
        self._folder.write_trials()


def run_sweep(
    plan: Plan,
    folder: SweepFolder,
    *,
    slots: Slots,
    machine: Machine,
    words: Words,
    signals: Signals,
    dashboard: bool = False,
) -> dict[str, Any]:
    """Run the trials of a plan that have not finished, and write the results; call it while holding the folder's lease.

    Args:
        plan: what to run.
        folder: its results folder, started.
        slots, machine: how many trials at once, on what.
        words: where progress is told.
        signals: looked at several times a second.
        dashboard: start Ray's.

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
        data = {key: load_image_data(_with_cache(config).data) for key, config in plan.datasets().items()}
        check_forget_sets(plan, data)
        sizes = {key: _bytes_of(item) for key, item in data.items()}
        started = time.monotonic()
        with contextlib.ExitStack() as session:
            with words.busy("starting Ray"):
                cpus = max(machine.cpus, slots.count * slots.cpus_per_trial)
                ray_of_our_own = local_ray(cpus=cpus, gpus=machine.gpus, shared_bytes=sum(sizes.values()), dashboard=dashboard)
                address = session.enter_context(ray_of_our_own)
                signals.install()  # Ray has taken SIGTERM
                signals.check()
            words.say(f"Ray started in {time.monotonic() - started:.1f} s" + (f", dashboard at {address}" if address else ""))
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
                n_threads=slots.cpus_per_trial,
            )
            with Board(plan, words.console, n_ended=len(plan.trials) - len(todo)) as board:
                _run_trials(shared, todo, slots, Follow(plan, folder, board, signals))
    return write_summary(plan, folder, slots=slots, machine=machine)


def _run_trials(shared: Shared, todo: Sequence[str], slots: Slots, follow: Follow) -> None:
    # What happens to the trials is told by `follow`; Tune's words on its own files and processes would break the table.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    trainable = tune.with_resources(
        tune.with_parameters(UnlearningTrial, shared=shared), {"cpu": slots.cpus_per_trial, "gpu": slots.gpus_per_trial}
    )
    tuner = tune.Tuner(
        trainable,
        param_space={"trial_id": tune.grid_search(list(todo))},
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            max_concurrent_trials=slots.count,
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(tune_folder()),
            stop=StoppingCriterionStopper(),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            callbacks=[follow],
            verbose=0,
        ),
    )
    tuner.fit()


def _name_of(trial: Any) -> str:
    return str(trial.config["trial_id"])


def _with_cache(config: TrainConfig) -> TrainConfig:
    return config.replace(dataset_cache_dir=config.dataset_cache_dir)


def _bytes_of(data: ImageData) -> int:
    return sum(array.nbytes for array in (data.train_images, data.train_labels, data.test_images, data.test_labels))
