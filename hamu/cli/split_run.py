"""A single run in several processes: this one checks, starts Ray, asks the workers to go on, and shows how far they are."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hamu
from hamu.cli.ray_environment import prepare_environment, ray_folder, usable_cores
from hamu.cli.security import check_token
from hamu.errors import ConfigError, HamuError
from hamu.training.config import TrainConfig
from hamu.training.progress import ProgressLine
from hamu.training.ray_workers import (
    Workers,
    WorkersError,
    WorkerSettings,
    check_address,
    check_workers,
    cluster_size,
    found_address,
    joined_ray,
    local_ray,
)
from hamu.training.stop import StopReason

REPORT_EVERY_S = 1.0


class StopRequest:
    """What a signal asks of a run in other processes; passed on with the next call."""

    def __init__(self) -> None:
        self.is_made = False

    def request_stop(self, reason: StopReason) -> None:
        """End the run at its next step."""
        self.is_made = True


def run_split(
    config: TrainConfig,
    *,
    stop: StopRequest,
    on_ray: Callable[[], None],
    on_start: Callable[[Mapping[str, float], bool], None],
) -> tuple[dict[str, Any], Path]:
    """Run one configuration in the processes that it asks for, and keep its model, metrics and records as `run_training` does.

    Args:
        config: with pairing split-gpu.
        stop: looked at about once a second.
        on_ray: called when Ray has started; it takes SIGTERM.
        on_start: called with the hardness at the first batches (empty for a method without a constraint), and whether that was
            measured by an earlier part of a run that is resumed.

    Returns:
        The result as a trial's row, and the model's folder.

    Raises:
        HamuError: the input is wrong, or there are too few GPUs or cores; nothing has been started on this machine then.
        WorkersError: the run failed twice since its last checkpoint.
    """
    import torch

    from hamu.training.original import choose_device
    from hamu.training.session import Session

    if config.run.ray_address is None:
        choose_device(config)
    session = Session(config, device=torch.device("cpu"))  # GPUs are for the workers
    if (row := session.ended_before()) is not None:
        return row, session.model_folder
    check_place(config)
    address = config.run.ray_address
    session.start_afresh()
    so_far = session.hardness_so_far()
    prepare_environment(Path(hamu.__file__).parents[1], joins_cluster=address is not None)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(ray_folder())
        what = "starting Ray" if address is None else f"joining Ray at {address}"
        print(f"{what}, and starting {config.run.num_workers} workers; this takes some seconds ...", file=sys.stderr, flush=True)
        if address is None:
            cpus, gpus = usable_cores(), _n_gpus(config)
            stack.enter_context(local_ray(cpus=cpus, gpus=gpus, shared_bytes=0, dashboard=False, folder=folder))
        else:
            address = found_address(address)
            check_token(address, os.environ, Path.home())
            stack.enter_context(joined_ray(address))
            folder = Path(config.run.artifact_root).resolve()  # one that all nodes see
        on_ray()  # also lets a signal end this process while the workers are being started
        cpus, gpus = cluster_size()
        settings = _settings(config, n_cpus=cpus, n_gpus=gpus if config.run.device != "cpu" else 0)
        from hamu.training.session_job import SessionJob

        name = f"{config.method_name}-{session.recipe}-{uuid.uuid4().hex[:6]}"
        storage = folder / f".ray_train_{name}"
        stack.callback(shutil.rmtree, storage, ignore_errors=True)
        workers = Workers(SessionJob, settings, folder=storage, name=name)
        stack.callback(workers.close)
        # Resuming: workers that are started again go on from the checkpoint.
        flat = config.replace(resume=True).to_flat()
        begun = workers.begin(config=flat, folder=os.getcwd(), run_id=name, measure=so_far is None)
        if "refused" in begun:
            raise HamuError(begun["refused"])
        if "failed" in begun:
            raise _failed(begun)
        on_start(begun["hardness"] if so_far is None else so_far, so_far is not None)
        with ProgressLine(begun["total_steps"], title=f"{config.method_name} x {config.run.num_workers}") as line:
            while not (told := workers.ask("advance", budget_s=REPORT_EVERY_S, stop=stop.is_made))["ended"]:
                line.show(told["step"], told)
            if "failed" in told:
                raise _failed(told)
            line.show(told["step"], told["row"])
    return told["row"], Path(told["model_folder"])


def check_place(config: TrainConfig) -> None:
    """Refuse a run for which this machine has too few GPUs or cores, or at whose cluster's address nobody answers, or asks for no
    token though others reach it.

    Raises:
        ConfigError: as said; before Ray is imported.
    """
    if config.run.ray_address is None:
        _settings(config, n_cpus=usable_cores(), n_gpus=_n_gpus(config))
    else:
        if config.run.ray_address != "auto":
            check_token(config.run.ray_address, os.environ, Path.home())
        check_address(config.run.ray_address)


def _failed(told: Mapping[str, Any]) -> WorkersError:
    return WorkersError(
        f"it failed twice from its last checkpoint (without one: from its start); the last error: {told['failed']}"
    )


def _settings(config: TrainConfig, *, n_cpus: int, n_gpus: int) -> WorkerSettings:
    """The processes to start: a whole GPU each, or a core and its share of the threads.

    Raises:
        ConfigError: there are not enough.
    """
    n, backend = config.run.num_workers, config.run.backend or ("nccl" if n_gpus else "gloo")
    if config.run.device == "cuda" and not n_gpus:
        raise ConfigError("device 'cuda' is not there: the cluster shows no GPUs; give --device cpu, or leave it out")
    check_workers(n, backend=backend, n_gpus=n_gpus, n_cpus=n_cpus)
    return WorkerSettings(
        n_workers=n,
        cpus_per_worker=min(1.0, n_cpus / n),  # with a GPU each, they may be more than the cores
        gpus_per_worker=1 / math.ceil(n / n_gpus) if n_gpus else 0.0,  # over gloo several may share one
        backend=backend,
        timeout_s=config.run.ddp_timeout,
        n_threads=_n_threads(n_cpus // n) if config.run.ray_address is None else 1,  # a cluster's other cores are not ours
    )


def _n_threads(share: int) -> int:
    import torch

    return max(1, min(share, torch.get_num_threads()))  # OMP_NUM_THREADS is heeded


def _n_gpus(config: TrainConfig) -> int:
    import torch

    return torch.cuda.device_count() if config.run.device != "cpu" and torch.cuda.is_available() else 0
