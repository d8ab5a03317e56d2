"""What trials need before the first one can begin: the rows, a Ray, the models that they start from."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from hamu.cli.ray_environment import ray_folder, token_hint
from hamu.hub import MODEL, fetch_model, is_cached, offline_environment
from hamu.tasks.catalog import modality_of
from hamu.training.config import TrainConfig
from hamu.training.probe import N_PAIRS
from hamu.training.ray_workers import local_ray
from launch.checks import check_forget_sets, is_on_hub
from launch.machine import Machine, Slots, gpu_environment
from launch.nodes import Watch
from launch.notices import Notices
from launch.originals import Provided, provide_models
from launch.pairing import pairing_of
from launch.plan import Plan
from launch.probe import Probe, probe_plan
from launch.results import SweepFolder
from launch.scheduling import Schedule, schedule_of
from launch.signals import Signals
from launch.words import Words


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Of a sweep: how many trials at once, on what; where progress is told; what has been sent to the process. is_joined: the Ray
    is a cluster that this process has joined; else it starts one of its own."""

    slots: Slots
    machine: Machine
    words: Words
    signals: Signals
    is_joined: bool = False


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What trials need, on the Ray that this process has joined. data: references to the rows, by data_key. notices: what the
    driver and the slots tell each other."""

    plan: Plan
    data: Mapping[str, Any]
    provided: Provided
    schedule: Schedule
    notices: Notices

    def watch(self, around: Surroundings) -> Watch:
        """Looks at the nodes while trials run."""
        n_workers = pairing_of(self.plan).n_workers
        return Watch(around.words.say, slots=around.slots, n_workers=n_workers, notices=self.notices)

    def probe(self, todo: Sequence[str], around: Surroundings, n_pairs: int | None) -> Probe:
        """Measure what the first pairs of gradients of the trials allow, and say it. n_pairs: None: as many as is usual."""
        probe = probe_plan(
            self.plan, todo, self.provided, self.data, n_pairs=n_pairs or N_PAIRS, slots=around.slots, machine=around.machine,
            words=around.words, signals=around.signals,
        )  # fmt: skip
        around.words.say(probe.text())
        return probe


@contextlib.contextmanager
def ready_on_ray(
    plan: Plan,
    todo: Sequence[str],
    folder: SweepFolder,
    around: Surroundings,
    *,
    dashboard: bool,
    wants_memory: bool = False,
) -> Iterator[Ready]:
    """Load the data, start a Ray of this process's own where none is joined, and provide the models that trials start from.

    Args:
        plan, todo: the trials, and ids of those that may run.
        folder: where the hashes of the originals and what is known of retain-only models are kept.
        around: of the sweep.
        dashboard: start Ray's.
        wants_memory: measure what a trial should need of a GPU's memory.

    Raises:
        HamuError: the data cannot be had, or the trials do not suit the scheduler.
        Interrupted: a signal came.
    """
    words, signals, slots = around.words, around.signals, around.slots
    plan = replace(plan, root=plan.root.resolve())  # workers have a working directory of their own
    signals.check()
    data = {key: modality_of(config).load_data(config) for key, config in plan.datasets().items()}
    check_forget_sets(plan, data)
    schedule = schedule_of(plan, data)
    bring_models(plan.configs.values(), words)
    sizes = {key: item.n_bytes for key, item in data.items()}
    own = _ray_of_our_own(around, shared_bytes=sum(sizes.values()), dashboard=dashboard)
    with contextlib.nullcontext() if around.is_joined else own:
        notices = Notices()
        references = {key: ray.put(item) for key, item in data.items()}
        provided = provide_models(
            plan, todo, references, sizes, slots=slots, machine=around.machine, words=words, signals=signals, folder=folder,
            wants_memory=wants_memory, watch=Watch(words.say, slots=slots, notices=notices),
        )  # fmt: skip
        yield Ready(plan=plan, data=references, provided=provided, schedule=schedule, notices=notices)


@contextlib.contextmanager
def _ray_of_our_own(around: Surroundings, *, shared_bytes: int, dashboard: bool) -> Iterator[None]:
    """Start a Ray of this process's own, say so, and stop it."""
    started = time.monotonic()
    os.environ.update(gpu_environment(around.machine, os.environ))
    with ray_folder() as folder, contextlib.ExitStack() as session:
        with around.words.busy("starting Ray"):
            starting = local_ray(
                cpus=max(around.machine.cpus, around.slots.count * around.slots.cpus_per_trial),
                gpus=around.machine.gpus,
                shared_bytes=shared_bytes,
                dashboard=dashboard,
                folder=folder,
            )
            address = session.enter_context(starting)
            around.signals.install()  # Ray has taken SIGTERM
            around.signals.check()
        board_at = f", dashboard at {address}{token_hint(is_terminal=around.words.console.is_terminal)}" if address else ""
        around.words.say(f"Ray started in {time.monotonic() - started:.1f} s{board_at}")
        yield


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
