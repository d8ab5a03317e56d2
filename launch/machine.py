"""What this machine has, and how many trials it runs at once. Reads the system, not torch or Ray."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hamu.cli.ray_environment import usable_cores
from hamu.errors import ConfigError
from launch.pairing import Pairing


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Cores that this process may use, GPUs that it may see, and their names."""

    cpus: int
    cpu_name: str
    memory_bytes: int
    gpus: int
    gpu_name: str | None = None

    def describe(self) -> str:
        """In a few words, for a terminal."""
        gpus = f", {self.gpus} x {self.gpu_name or 'GPU'}" if self.gpus else ", no GPU"
        return f"{self.cpus} cores ({self.cpu_name}){gpus}, {self.memory_bytes / 2**30:.0f} GiB"

    def to_json(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            "cpus": self.cpus, "cpu": self.cpu_name, "gpus": self.gpus, "gpu": self.gpu_name, "memory_bytes": self.memory_bytes,
            "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Slots:
    """How many trials run at once, and what each may use. warning: what a user should know about it."""

    count: int
    cpus_per_trial: int = 1
    gpus_per_trial: float = 0.0
    workers_per_trial: int = 1
    backend: str = "gloo"
    warning: str | None = None

    @property
    def cpus_per_worker(self) -> int:
        """Cores of each process of a trial."""
        return self.cpus_per_trial // self.workers_per_trial

    @property
    def gpus_per_worker(self) -> float:
        """GPUs of each process of a trial."""
        return self.gpus_per_trial / self.workers_per_trial

    def describe(self) -> str:
        """In a few words, for a terminal."""
        gpus = f" and {self.gpus_per_worker:g} GPU" if self.gpus_per_trial else ""
        workers = f", {self.workers_per_trial} workers a trial ({self.backend})" if self.workers_per_trial > 1 else ""
        return f"{self.count} at once{workers}, {self.cpus_per_worker} core{'s' * (self.cpus_per_worker != 1)}{gpus} each"


def this_machine(environment: Mapping[str, str]) -> Machine:
    """Look at the machine; `CUDA_VISIBLE_DEVICES` of the environment is honoured."""
    names = _gpu_names()
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and names:
        wanted = [part.strip() for part in visible.split(",") if part.strip() and part.strip() != "-1"]
        names = names[: len(wanted)]
    return Machine(
        cpus=usable_cores(),
        cpu_name=_cpu_name(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=len(names),
        gpu_name=names[0] if names else None,
    )


def choose_slots(
    machine: Machine,
    *,
    n_trials: int,
    max_concurrent: int | None = None,
    gpus: float | None = None,
    pairing: Pairing | None = None,
) -> Slots:
    """One core a trial; where there are GPUs, one GPU a trial, or the share asked for; of a split trial that much a worker.

    Args:
        machine: what there is.
        n_trials: trials to run; more slots than that are of no use.
        max_concurrent: slots asked for; more than there are cores is allowed (they share), more than the GPUs hold is not.
        gpus: GPUs a trial: 0 (none), a share in (0, 1], or a whole number; of a split trial 0, or one a worker.
        pairing: of the trials; default: one process each.

    Raises:
        ConfigError: the machine cannot do what is asked.
    """
    if max_concurrent is not None and max_concurrent < 1:
        raise ConfigError(f"--max-concurrent {max_concurrent}: it is the number of trials at once; give 1 or more")
    if gpus is not None and (not 0 <= gpus < float("inf") or (gpus > 1 and gpus != int(gpus))):
        raise ConfigError(f"--gpus {gpus:g}: GPUs a trial are 0, a share up to 1, or a whole number; give e.g. 0.5")
    if pairing is not None and pairing.is_split:
        return _split_slots(machine, pairing, n_trials=n_trials, max_concurrent=max_concurrent, gpus=gpus)
    share = gpus if gpus is not None else (1.0 if machine.gpus else 0.0)
    if share == 0:
        return Slots(count=max(1, min(max_concurrent or machine.cpus, n_trials)))
    # Trials on a share of a GPU must not straddle two of them.
    fitting = machine.gpus * int(1 / share + 1e-9) if share <= 1 else machine.gpus // int(share)
    if fitting < 1:
        raise ConfigError(f"--gpus {share:g}: this machine shows {machine.gpus} GPUs; give --gpus 0 to run on its cores")
    if max_concurrent is not None and max_concurrent > fitting:
        raise ConfigError(
            f"--max-concurrent {max_concurrent}: {machine.gpus} GPUs hold {fitting} trials of {share:g}; "
            f"give at most {fitting}, or a smaller --gpus"
        )
    count = max(1, min(max_concurrent or fitting, n_trials))
    return Slots(count=count, cpus_per_trial=max(1, machine.cpus // fitting), gpus_per_trial=share)


def _split_slots(machine: Machine, pairing: Pairing, *, n_trials: int, max_concurrent: int | None, gpus: float | None) -> Slots:
    n_workers = pairing.n_workers
    if gpus not in (None, 0, n_workers):
        raise ConfigError(
            f"--gpus {gpus:g}: with gradient_pairing split-gpu each of the {n_workers} workers of a trial has a whole GPU; leave "
            f"--gpus out, or give --gpus 0 to run on cores, or --set gradient_pairing=sequential for shares of a GPU"
        )
    on_gpus = bool(gpus or (machine.gpus and gpus is None))
    backend = pairing.backend or ("nccl" if on_gpus else "gloo")
    if backend == "nccl" and machine.gpus * on_gpus < n_workers:
        shown = machine.gpus if on_gpus else 0
        raise ConfigError(
            f"num_workers {n_workers} with NCCL takes {n_workers} whole GPUs a trial, and there are {shown} to use; "
            "use --set gradient_pairing=sequential, or --set backend=gloo"
        )
    if on_gpus and machine.gpus == 0:
        raise ConfigError(f"--gpus {gpus:g}: this machine shows 0 GPUs; give --gpus 0 to run on its cores")
    per_gpu = -(-n_workers // machine.gpus) if on_gpus else 1  # workers that share a GPU, which gloo allows
    fitting = machine.gpus * per_gpu // n_workers if on_gpus else max(1, machine.cpus // n_workers)
    if on_gpus and max_concurrent is not None and max_concurrent > fitting:
        raise ConfigError(
            f"--max-concurrent {max_concurrent}: {machine.gpus} GPUs hold {fitting} trials of {n_workers} workers; "
            f"give at most {fitting}"
        )
    warning = None
    if machine.cpus < n_workers:
        warning = f"num_workers {n_workers}: this machine has {machine.cpus} cores, so the workers share them and gain no time"
    return Slots(
        count=max(1, min(max_concurrent or fitting, n_trials)),
        cpus_per_trial=n_workers * (max(1, machine.cpus // (fitting * n_workers)) if on_gpus else 1),
        gpus_per_trial=n_workers / per_gpu if on_gpus else 0.0,
        workers_per_trial=n_workers,
        backend=backend,
        warning=warning,
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.split(":", 1)[1].split("(UUID")[0].strip() for line in listed.splitlines() if line.startswith("GPU ")]
