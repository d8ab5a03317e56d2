"""Resident training processes under Ray Train: the only file of `hamu` that knows Ray.

    workers = Workers(make, WorkerSettings(n_workers=2), folder=folder, name="slot")   # `make` is called once in each process
    workers.begin(trial_id="a")         # all processes call handler.begin(trial_id="a"); the reply is rank 0's
    workers.ask("advance", budget_s=1)
    workers.begin(trial_id="b")         # the same processes take the next job
    workers.close()

A slot is one `TorchTrainer` run, held across jobs. Its train function takes one call after another from the slot's mailbox, an
actor without a CPU of its own. When a process dies, raises or hangs, Ray Train starts all of them anew, and the mailbox hands
them the job's `begin` again and then the call that was not answered: the caller sees its reply, some seconds later. Processes
that hang are found `timeout_s` after, by a partner that waits for them, or by Ray Train.

Importing this file imports neither Ray nor torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hamu.errors import ConfigError
from hamu.training.mailbox import Mailbox

if TYPE_CHECKING:
    from hamu.training.groups import Group

RAY_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a dead process is seen this soon; Ray's default is 2
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean here
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",  # what hangs will not answer; it is killed
}
"""What Ray Train reads from the environment. The mailbox's processes, and all that they start, are given it with their actor."""

_CONNECT_S = 5.0
_CLOSE_S = 10.0
_FORCE_S = 5.0
_FREE_EVERY_S = 2.0
_MAX_START_FAILURES = 30  # of processes that have their cores; for those they wait as long as it takes


class WorkersError(RuntimeError):
    """The workers cannot be had: their run has ended, or they died over one call three times in a row."""


class JobHandler(Protocol):
    """What lives in each worker process and does the work. Any method may be called, on all ranks at once, by keyword."""

    @property
    def begin(self) -> Callable[..., dict[str, Any]]:
        """Open a job; called again in new processes when the old ones have died."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """The processes of one slot."""

    n_workers: int
    cpus_per_worker: float = 1.0
    """Cores that each one holds, in Ray's books."""
    gpus_per_worker: float = 0.0
    """GPUs that each one holds; 0: they compute on CPUs."""
    backend: str = "gloo"
    """"gloo" or "nccl"."""
    timeout_s: float = 300.0
    """After this long, a process that waits for another, or that does not answer Ray, is given up."""
    n_threads: int = 1
    """torch's threads in each."""
    prepare: Callable[[], object] | None = None
    """Called in each process before its process group is made."""


def check_workers(n_workers: int, *, backend: str, n_gpus: int, n_cpus: int) -> None:
    """Refuse what this machine or cluster cannot run: one whole GPU a worker, or one core where there is no GPU.

    Raises:
        ConfigError: more workers than GPUs or cores.
    """
    if backend == "nccl" and n_workers > n_gpus:
        raise ConfigError(
            f"num_workers {n_workers} needs {n_workers} whole GPUs, got {n_gpus}: NCCL cannot have two workers on one GPU; "
            "use --backend gloo, or gradient_pairing 'sequential' with num_workers 1"
        )
    if backend != "nccl" and n_workers > n_cpus:
        raise ConfigError(
            f"num_workers {n_workers} needs as many cores, got {n_cpus}; use {_fewer(n_cpus)}gradient_pairing 'sequential' "
            "with num_workers 1"
        )


def _fewer(n_cpus: int) -> str:
    """The mend of too many workers: the largest even number that fits, if there is one."""
    return f"num_workers {n_cpus // 2 * 2}, or " if n_cpus > 1 else ""


class Workers:
    """The processes of one slot, as whoever gives them jobs sees them. Use it from one thread.

    Args:
        make: builds a process's handler from its group; may hold `ObjectRef`s. Called once in each process.
        settings: how many processes, with what.
        folder: where Ray Train may leave its own files; nobody reads them. On a cluster, one that all nodes see, or a URL.
        name: of the slot, in Ray's logs; unique among those that run.
    """

    def __init__(self, make: Callable[[Group], JobHandler], settings: WorkerSettings, *, folder: Path | str, name: str) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        free_placement_groups()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        checks = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(settings.timeout_s)}
        actor: Any = ray.remote(num_cpus=0)(_SlotActor).options(
            scheduling_strategy=here, runtime_env={"env_vars": RAY_TRAIN_SETTINGS | checks}
        )
        self._make = ray.put(make)  # kept here; only the workers unpack it
        self._mailbox: Any = actor.remote(settings.n_workers)
        self._mailbox.start.remote([self._make], settings, str(folder), name)
        self._is_closed = False

    def begin(self, **arguments: Any) -> dict[str, Any]:
        """Open a job in all processes; as `ask`."""
        return self.ask("begin", **arguments)

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Have all processes call a method of their handlers, and wait until all have done it.

        Returns:
            Rank 0's reply.

        Raises:
            WorkersError: there are no workers to do it.
        """
        import ray

        if self._is_closed:
            raise WorkersError(f"the workers are closed; nobody can do {method!r}")
        try:
            answer = self._mailbox.ask.remote(method, arguments)
            while not ray.wait([answer], timeout=_FREE_EVERY_S)[0]:
                free_placement_groups()  # the processes may be waiting for what a dead slot still holds
            reply, error = ray.get(answer)
        except ray.exceptions.RayActorError as dead:
            raise WorkersError(f"the workers' mailbox has died: {dead}") from dead
        if error:
            raise WorkersError(error)
        return reply

    def close(self) -> None:
        """Let the processes go, by force after 10 seconds; nothing of them is left."""
        import ray

        if self._is_closed:
            return
        self._is_closed = True
        is_ended = False
        with contextlib.suppress(ray.exceptions.RayError):
            is_ended = ray.get(self._mailbox.close.remote(), timeout=_CLOSE_S)
        ray.kill(self._mailbox)  # whatever it owns goes with it: the controller, and the controller's workers
        deadline = time.monotonic() + _FORCE_S
        while not free_placement_groups() and not is_ended and time.monotonic() < deadline:
            time.sleep(0.1)


def free_placement_groups() -> int:
    """Give back what dead slots of this Ray job still hold, and return how many there were.

    Ray Train's controller makes a placement group in its own name, and Ray keeps it when the controller dies without a word, as
    it does with its slot's process. Ray Train's own cleaner needs the dashboard; this asks Ray's table of actors.
    """
    import ray
    from ray._private.state import state
    from ray._raylet import PlacementGroupID
    from ray.core.generated.gcs_pb2 import ActorTableData  # type: ignore[attr-defined]
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    accessor = state._connect_and_get_accessor()
    n_freed = 0
    for group in _groups_of_this_job():
        if not any(byte != 0xFF for byte in group.creator_actor_id):
            continue
        creator = accessor.get_actor_info(ray.ActorID(group.creator_actor_id))
        if creator is None or ActorTableData.FromString(creator).state == ActorTableData.DEAD:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
            n_freed += 1
    return n_freed


def pending_groups() -> list[list[dict[str, float]]]:
    """The placement groups of this Ray job that have no place, or lost a node of theirs: the resources of each one's bundles."""
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]

    waiting = (PlacementGroupTableData.PENDING, PlacementGroupTableData.RESCHEDULING)
    groups = [group for group in _groups_of_this_job() if group.state in waiting]
    return [[dict(bundle.unit_resources) for bundle in group.bundles] for group in groups]


def _groups_of_this_job() -> list[Any]:
    """The rows of this job's placement groups in Ray's table, without those that were removed."""
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]

    job_id = bytes.fromhex(ray.get_runtime_context().get_job_id())
    rows = state._connect_and_get_accessor().get_placement_group_table()
    groups = [PlacementGroupTableData.FromString(row) for row in rows]
    is_removed = PlacementGroupTableData.REMOVED
    return [group for group in groups if group.creator_job_id == job_id and group.state != is_removed]


@contextlib.contextmanager
def local_ray(*, cpus: int, gpus: int, shared_bytes: int, dashboard: bool, folder: Path) -> Iterator[str | None]:
    """Start a Ray of this process's own, give the dashboard's address (None without one), and stop it.

    Prepare the environment before. It joins no cluster and dies with this process.

    Args:
        cpus, gpus: what trials may take.
        shared_bytes: size of what is put into the object store.
        dashboard: start it, on the loopback.
        folder: for Ray's temporary files; short, and closed to other users.
    """
    import ray

    context = ray.init(
        address="local",
        num_cpus=cpus,
        num_gpus=gpus,
        include_dashboard=dashboard,
        dashboard_host="127.0.0.1",
        object_store_memory=256 * 2**20 + 2 * shared_bytes,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=str(folder / "ray"),  # Ray opens this one to all users, so it lies in one that is closed
    )
    try:
        yield f"http://{context.dashboard_url}" if context.dashboard_url else None
    finally:
        ray.shutdown()


def cluster_size() -> tuple[int, int]:
    """Cores and GPUs of the Ray that this process is in."""
    import ray

    resources = ray.cluster_resources()
    return int(resources.get("CPU", 0)), int(resources.get("GPU", 0))


def found_address(address: str) -> str:
    """`host:port` of the cluster that an address names; "auto": the one that this machine is a node of.

    Raises:
        ConfigError: there is none here, or several.
    """
    if address != "auto":
        return address
    from ray._private.services import find_gcs_addresses

    found = sorted(find_gcs_addresses())
    if len(found) != 1:
        which = ", ".join(found) if found else "none"
        raise ConfigError(
            f"address auto: Ray clusters that run on this machine: {which}; give host:port of the one to join, or start one with "
            "`ray start --head`"
        )
    return found[0]


def check_address(address: str) -> None:
    """Refuse a named address where nobody answers: Ray itself would try for minutes, and then end the process.

    Args:
        address: `host:port` of a cluster's head, or "auto", which `found_address` looks for.

    Raises:
        ConfigError: nothing answers there within five seconds.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster at {address!r} ({error}); start one with `ray start --head`, or leave the address out"
        ) from error


@contextlib.contextmanager
def joined_ray(address: str) -> Iterator[str | None]:
    """Join a cluster that runs, give its dashboard's address (None without one), and leave it running.

    Args:
        address: `host:port` of its head, or "auto" on one of its machines.

    Raises:
        ConfigError: nothing answers there.
    """
    import ray

    check_address(address)
    try:
        context = ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"no Ray cluster at {address!r} ({text}); start one, or leave the address out") from error
    try:
        yield f"http://{context.dashboard_url}" if context.dashboard_url else None
    finally:
        ray.shutdown()


class _SlotActor(Mailbox):
    """The slot's actor: its mailbox, and the owner of its `TorchTrainer` run, which it takes along when it is killed."""

    async def start(self, make: list[Any], settings: WorkerSettings, folder: str, name: str) -> None:
        """Start the processes; `make` holds the reference to what builds a handler."""
        import ray

        loop, mailbox = asyncio.get_running_loop(), ray.get_runtime_context().current_actor

        def fit() -> None:
            why = "their run ended"
            try:
                _fit({"mailbox": mailbox, "make": make, "settings": settings}, settings, folder, name)
            except BaseException as error:
                why = f"{type(error).__name__}: {error}"
            asyncio.run_coroutine_threadsafe(self.ended(why), loop)

        threading.Thread(target=fit, daemon=True, name="fit").start()


def _fit(work: dict[str, Any], settings: WorkerSettings, folder: str, name: str) -> None:
    """Run the train function in Ray Train's workers, for as long as the slot lives."""
    from ray.train import ControllerError
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.torch.config import _TorchBackend
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    class Backend(_TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            if settings.prepare is not None:
                worker_group.execute(settings.prepare)
            super().on_start(worker_group, backend_config)

    class Torch(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return Backend

    class Patient(DefaultFailurePolicy):
        def make_decision(self, training_failed_error: Any) -> Any:
            failure = getattr(training_failed_error, "controller_failure", None)
            if isinstance(training_failed_error, ControllerError) and isinstance(failure, WorkerGroupStartupTimeoutError):
                return FailureDecision.RETRY  # there is no place for them yet: a node was lost, or others are still there
            return super().make_decision(training_failed_error)

    class Fixed(FixedScalingPolicy):
        # The cores are asked for by the placement group, which an autoscaler heeds too. Ray Train would tell a process besides,
        # which it shares with others and leaves behind for ever.
        def after_controller_start(self, train_run_context: Any) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    class Trainer(TorchTrainer):
        def _initialize_and_run_controller(self, **given: Any) -> Any:
            given["failure_policy"] = Patient(run_config.failure_config)
            given["scaling_policy"] = Fixed(scaling)
            return super()._initialize_and_run_controller(**given)  # type: ignore[misc]

        def _create_default_callbacks(self) -> list[Any]:
            # Neither is of use here, and each is a process: one hands out Ray's datasets; the other frees placement groups by
            # asking the dashboard, and where there is none, it outlives the slot for ever.
            unused = ("DatasetsCallback", "PlacementGroupCleanerCallback")
            every: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
            return [callback for callback in every if type(callback).__name__ not in unused]

    resources = {"CPU": settings.cpus_per_worker} | ({"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {})
    scaling: Any = ScalingConfig(
        num_workers=settings.n_workers, use_gpu=settings.gpus_per_worker > 0, resources_per_worker=resources
    )
    run_config: Any = RunConfig(
        name=name,
        storage_path=folder,
        failure_config=FailureConfig(max_failures=-1, controller_failure_limit=_MAX_START_FAILURES),
        logging_config=LoggingConfig(log_level="ERROR"),
    )
    Trainer(
        _serve,
        train_loop_config=work,
        torch_config=Torch(backend=settings.backend, timeout_s=math.ceil(settings.timeout_s)),
        scaling_config=scaling,
        run_config=run_config,
    ).fit()


def _serve(work: dict[str, Any]) -> None:
    """The train function: do one call after another until told to leave. A failure ends the process."""
    import ray
    import torch
    from ray import train

    from hamu.training.groups import Group

    mailbox, settings = work["mailbox"], work["settings"]
    group = ray.util.get_current_placement_group()
    assert group is not None, "Ray Train starts its workers in a placement group"
    generation, rank = group.id.hex(), train.get_context().get_world_rank()
    ray.get(mailbox.arrive.remote(generation))  # from here on a death counts
    try:
        torch.set_num_threads(settings.n_threads)
        device = train.torch.get_device() if settings.gpus_per_worker else torch.device("cpu")
        handler = ray.get(work["make"][0])(Group.current(device))
        n_done = 0
        reply: dict[str, Any] = {}
        while call := ray.get(mailbox.turn.remote(generation, rank, n_done, reply if rank == 0 else {})):
            method, arguments = call
            reply = getattr(handler, method)(**arguments)
            n_done += 1
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        logging.getLogger(__name__).error("rank %d: %s", rank, traceback.format_exc())
        is_first = True
        with contextlib.suppress(Exception):  # the mailbox may be gone, and these processes with it
            is_first = ray.get(mailbox.fail.remote(generation, rank, text), timeout=_CLOSE_S)
        if is_first:
            _leave_at_once()  # partners may wait for this process, and cannot be asked to leave, but they see that it is gone
        raise RuntimeError(text) from None  # Ray Train ends this process too; not every error can be pickled


def _leave_at_once() -> None:
    """End this worker process in a way that Ray does not report on the terminal as a crash; by force after two seconds."""
    from ray._private.worker import global_worker

    threading.Timer(2.0, os._exit, (1,)).start()
    global_worker.core_worker.drain_and_exit_worker("user", b"failed, and is replaced")  # type: ignore[attr-defined]
