"""What this machine has, and how many trials it runs at once. Reads the system, not torch or Ray."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hamu.cli.ray_environment import usable_cores
from hamu.errors import ConfigError
from launch.gpus import VISIBLE, visible_gpus
from launch.pairing import Pairing

MEMORY_MARGIN = 1.25
"""What a trial is given of a GPU's memory, over its estimate: what allocators leave unused."""

CONTEXT_BYTES = int(0.6 * 2**30)
"""What CUDA and its libraries take of a GPU in each process: an assumption, not a measurement, as drivers differ."""

_RAY_STEPS = 10_000
"""Ray counts resources in ten-thousandths."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Cores that this process may use, GPUs that it may see, and their names.

    gpu_memory_bytes: of the smallest of them; None: not known. gpu_ids: their names for `CUDA_VISIBLE_DEVICES`. has_mig: some are
    parts of a GPU (MIG devices), which work alone only. nodes: cores and GPUs of each machine of a cluster; empty: it is one.
    """

    cpus: int
    cpu_name: str
    memory_bytes: int
    gpus: int
    gpu_name: str | None = None
    gpu_memory_bytes: int | None = None
    gpu_ids: tuple[str, ...] = ()
    has_mig: bool = False
    nodes: tuple[tuple[int, int], ...] = ()

    @property
    def most_cpus(self) -> int:
        """Cores of the largest node: what one process can have at most."""
        return max((cpus for cpus, _ in self.nodes), default=self.cpus)

    def describe(self) -> str:
        """In a few words, for a terminal."""
        memory = f" ({self.gpu_memory_bytes / 2**30:.0f} GiB)" if self.gpu_memory_bytes else ""
        gpus = f", {self.gpus} x {self.gpu_name or 'GPU'}{memory}" if self.gpus else ", no GPU"
        own = f", {self.memory_bytes / 2**30:.0f} GiB" if self.memory_bytes else ""
        return f"{self.cpus} cores ({self.cpu_name}){gpus}{own}"

    def to_json(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            "cpus": self.cpus, "cpu": self.cpu_name, "gpus": self.gpus, "gpu": self.gpu_name, "memory_bytes": self.memory_bytes,
            "gpu_memory_bytes": self.gpu_memory_bytes, "gpu_ids": list(self.gpu_ids),
            "nodes": [list(node) for node in self.nodes], "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Slots:
    """How many trials run at once, and what each may use. warning: what a user should know about it. most: as many at once as
    make sense, or were asked for, whatever the machine holds."""

    count: int
    cpus_per_trial: int = 1
    gpus_per_trial: float = 0.0
    workers_per_trial: int = 1
    backend: str = "gloo"
    warning: str | None = None
    most: int | None = field(default=None, compare=False)

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
    gpus = visible_gpus(environment)
    memory = [gpu.memory_bytes for gpu in gpus if gpu.memory_bytes is not None]
    return Machine(
        cpus=usable_cores(),
        cpu_name=_cpu_name(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=len(gpus),
        gpu_name=gpus[0].name if gpus else None,
        gpu_memory_bytes=min(memory) if memory and len(memory) == len(gpus) else None,
        gpu_ids=tuple(gpu.id for gpu in gpus),
        has_mig=any(gpu.is_mig for gpu in gpus),
    )


def gpu_environment(machine: Machine, environment: Mapping[str, str]) -> dict[str, str]:
    """What to set before Ray starts, so that the processes that it hands its n-th GPU see that one.

    Ray counts devices and looks them up in `CUDA_VISIBLE_DEVICES`, or takes their numbers where it is not set; MIG devices have
    none, only UUIDs, and Ray does not strip blanks.
    """
    if machine.gpu_ids and (machine.has_mig or VISIBLE in environment):
        return {VISIBLE: ",".join(machine.gpu_ids)}
    return {}


def choose_slots(
    machine: Machine,
    *,
    n_trials: int,
    max_concurrent: int | None = None,
    gpus: float | None = None,
    pairing: Pairing | None = None,
    shares_gpus: bool = False,
) -> Slots:
    """One core a trial; where there are GPUs, one GPU a trial, or the share asked for; of a split trial that much a worker.

    Args:
        machine: what there is.
        n_trials: trials to run; more slots than that are of no use.
        max_concurrent: slots asked for; more than there are cores is allowed (they share), more than the GPUs hold is not.
        gpus: GPUs a trial: 0 (none), a share in (0, 1], or a whole number; of a split trial 0, or one a worker.
        pairing: of the trials; default: one process each.
        shares_gpus: `fit_slots` will decide how many trials share a GPU, so that one a GPU is a beginning only.

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
    most = min(max_concurrent or n_trials, n_trials)
    if share == 0:
        return Slots(count=max(1, min(max_concurrent or machine.cpus, n_trials)), most=most)
    # Trials on a share of a GPU must not straddle two of them, nor several GPUs of a trial two nodes.
    nodes = machine.nodes or ((machine.cpus, machine.gpus),)
    fitting = machine.gpus * int(1 / share + 1e-9) if share <= 1 else sum(gpus // int(share) for _, gpus in nodes)
    if fitting < 1:
        shown = f"{machine.gpus} GPUs" + f" on {len(nodes)} nodes" * (len(nodes) > 1)
        raise ConfigError(f"--gpus {share:g}: {_there(machine)} shows {shown}; give --gpus 0 to run on its cores")
    if max_concurrent is not None and max_concurrent > fitting and not shares_gpus:
        raise ConfigError(
            f"--max-concurrent {max_concurrent}: {machine.gpus} GPUs hold {fitting} trials of {share:g}; "
            f"give at most {fitting}, or a smaller --gpus"
        )
    count = max(1, min(max_concurrent or fitting, n_trials, fitting))
    return Slots(count=count, cpus_per_trial=_cpus_beside(nodes, share), gpus_per_trial=share, most=most)


def fit_slots(slots: Slots, machine: Machine, memory_bytes: int | None) -> Slots:
    """Let as many trials share a GPU as its memory holds by estimate; no more than there are cores for, or than it takes for all
    that are wanted at once.

    Args:
        slots: as `choose_slots` gave them, with a whole GPU a trial; where trials use no GPU they stay as they are.
        machine: what there is.
        memory_bytes: of the GPU, that a trial should need at most of its own (`MemoryEstimate.total`); None: not known.

    Raises:
        ConfigError: a trial is split over workers.
    """
    if slots.workers_per_trial > 1:
        raise ConfigError(
            f"--gpus-per-worker auto: each of the {slots.workers_per_trial} workers of a trial has a whole GPU; leave "
            "it out, or use --set gradient_pairing=sequential"
        )
    if slots.gpus_per_trial == 0 or machine.gpus == 0:
        return slots
    if memory_bytes is None or machine.gpu_memory_bytes is None:
        of = "a trial" if memory_bytes is None else "the GPU"
        return replace(slots, warning=f"--gpus-per-worker auto: the memory of {of} is not known, so each trial has a whole GPU")
    needed = int(MEMORY_MARGIN * memory_bytes) + CONTEXT_BYTES
    by_memory = machine.gpu_memory_bytes // needed
    wanted = -(-slots.most // machine.gpus) if slots.most else by_memory  # a trial that could have more of a GPU gets it
    n_per_gpu = max(1, min(by_memory, machine.cpus // machine.gpus, wanted))
    warning = slots.warning
    if by_memory < 1:
        warning = (
            f"a trial may need {needed / 2**30:.1f} GiB of a GPU's {machine.gpu_memory_bytes / 2**30:.1f} GiB, by estimate; give "
            "a smaller batch_size with more gradient_accumulation_steps if it fails"
        )
    fitting = n_per_gpu * machine.gpus
    return replace(
        slots,
        count=max(1, min(fitting, slots.most or fitting)),
        cpus_per_trial=max(1, machine.cpus // fitting),
        gpus_per_trial=1.0 if n_per_gpu == 1 else _RAY_STEPS // n_per_gpu / _RAY_STEPS,
        warning=warning,
    )


def fit_text(slots: Slots, machine: Machine, memory_bytes: int | None) -> str:
    """What `fit_slots` has come to, for a terminal: the slots, what decided on them, and their warning."""
    is_fitted = slots.gpus_per_trial > 0 and memory_bytes is not None and machine.gpu_memory_bytes is not None
    by = ", by the memory that a trial should need" if is_fitted else ""
    warning = f"\nwarning: {slots.warning}" if slots.warning else ""
    return f"{slots.describe()}{by}{warning}"


def memory_cap(slots: Slots, machine: Machine) -> float | None:
    """Share of a GPU's memory that the allocator of a trial's process may take; None: no cap, as it has the GPU to itself."""
    if not 0 < slots.gpus_per_worker < 1 or slots.workers_per_trial > 1:
        return None
    context = CONTEXT_BYTES / machine.gpu_memory_bytes if machine.gpu_memory_bytes else 0.0
    return max(slots.gpus_per_worker - context, slots.gpus_per_worker / 2)


def _split_slots(machine: Machine, pairing: Pairing, *, n_trials: int, max_concurrent: int | None, gpus: float | None) -> Slots:
    n_workers = pairing.n_workers
    if gpus not in (None, 0, n_workers):
        raise ConfigError(
            f"--gpus {gpus:g}: with gradient_pairing split-gpu each of the {n_workers} workers of a trial has a whole GPU; leave "
            f"--gpus out, or give --gpus 0 to run on cores, or --set gradient_pairing=sequential for shares of a GPU"
        )
    on_gpus = bool(gpus or (machine.gpus and gpus is None))
    if on_gpus and machine.has_mig:
        raise ConfigError(
            f"num_workers {n_workers}: the GPUs here are cut into MIG devices, which cannot work together; use "
            "--set gradient_pairing=sequential, or --gpus 0 to run on the cores"
        )
    backend = pairing.backend or ("nccl" if on_gpus else "gloo")
    if backend == "nccl" and machine.gpus * on_gpus < n_workers:
        shown = machine.gpus if on_gpus else 0
        raise ConfigError(
            f"num_workers {n_workers} with NCCL takes {n_workers} whole GPUs a trial, and there are {shown} to use; "
            "use --set gradient_pairing=sequential, or --set backend=gloo"
        )
    if on_gpus and machine.gpus == 0:
        raise ConfigError(f"--gpus {gpus:g}: {_there(machine)} shows 0 GPUs; give --gpus 0 to run on its cores")
    per_gpu = -(-n_workers // machine.gpus) if on_gpus else 1  # workers that share a GPU, which gloo allows
    fitting = machine.gpus * per_gpu // n_workers if on_gpus else max(1, machine.cpus // n_workers)
    if on_gpus and max_concurrent is not None and max_concurrent > fitting:
        raise ConfigError(
            f"--max-concurrent {max_concurrent}: {machine.gpus} GPUs hold {fitting} trials of {n_workers} workers; "
            f"give at most {fitting}"
        )
    cpus_per_worker = max(1, machine.cpus // (fitting * n_workers))
    if machine.nodes:  # any of them may hold any worker
        cpus_per_worker = min(cpus_per_worker, _cpus_beside(machine.nodes, 1 / per_gpu))
    warning = None
    if machine.cpus < n_workers:
        there = _there(machine)
        warning = f"num_workers {n_workers}: {there} has {machine.cpus} cores, so the workers share them and gain no time"
    return Slots(
        count=max(1, min(max_concurrent or fitting, n_trials)),
        cpus_per_trial=n_workers * (cpus_per_worker if on_gpus else 1),
        gpus_per_trial=n_workers / per_gpu if on_gpus else 0.0,
        workers_per_trial=n_workers,
        backend=backend,
        warning=warning,
        most=min(max_concurrent or n_trials, n_trials),
    )


def _there(machine: Machine) -> str:
    return "the cluster" if machine.nodes else "this machine"


def _cpus_beside(nodes: tuple[tuple[int, int], ...], share: float) -> int:
    """Cores of a trial that has this many GPUs, so that every node with GPUs holds as many trials as its GPUs do."""
    of_node = [(cpus, int(gpus * int(1 / share + 1e-9) if share <= 1 else gpus // int(share))) for cpus, gpus in nodes if gpus]
    return max(1, min((cpus // held for cpus, held in of_node if held), default=1))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
