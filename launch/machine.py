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

from hamu.errors import ConfigError

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


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
    """How many trials run at once, and what each may use."""

    count: int
    cpus_per_trial: int = 1
    gpus_per_trial: float = 0.0

    def describe(self) -> str:
        """In a few words, for a terminal."""
        gpus = f" and {self.gpus_per_trial:g} GPU" if self.gpus_per_trial else ""
        return f"{self.count} at once, {self.cpus_per_trial} core{'s' * (self.cpus_per_trial != 1)}{gpus} each"


def this_machine(environment: Mapping[str, str]) -> Machine:
    """Look at the machine; `CUDA_VISIBLE_DEVICES` of the environment is honoured."""
    names = _gpu_names()
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and names:
        wanted = [part.strip() for part in visible.split(",") if part.strip() and part.strip() != "-1"]
        names = names[: len(wanted)]
    return Machine(
        cpus=_usable_cores(),
        cpu_name=_cpu_name(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=len(names),
        gpu_name=names[0] if names else None,
    )


def choose_slots(machine: Machine, *, n_trials: int, max_concurrent: int | None = None, gpus: float | None = None) -> Slots:
    """One core a trial; where there are GPUs, one GPU a trial, or the share asked for.

    Args:
        machine: what there is.
        n_trials: trials to run; more slots than that are of no use.
        max_concurrent: slots asked for; more than there are cores is allowed (they share), more than the GPUs hold is not.
        gpus: GPUs a trial: 0 (none), a share in (0, 1], or a whole number.

    Raises:
        ConfigError: the machine cannot do what is asked.
    """
    if max_concurrent is not None and max_concurrent < 1:
        raise ConfigError(f"--max-concurrent {max_concurrent}: it is the number of trials at once; give 1 or more")
    if gpus is not None and (not 0 <= gpus < float("inf") or (gpus > 1 and gpus != int(gpus))):
        raise ConfigError(f"--gpus {gpus:g}: GPUs a trial are 0, a share up to 1, or a whole number; give e.g. 0.5")
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


def _usable_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = _CPU_QUOTA.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores


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
