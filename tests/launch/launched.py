"""`python launch/sweep.py` as a user starts it, and the processes below it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHORT = ("--set", "epochs=0.5", "--set", "lr=0.02", "--set", "original.num_train_epochs=1")
SETTINGS = (
    "trial_id", "method", "seed", "rho", "learning_rate", "constraint_ratio", "steps", "stop_reason", "train_s",
    *(f"{split}_{metric}" for split in ("retain", "forget", "test") for metric in ("loss", "accuracy")),
    "forget_quality", "retain_utility",
)  # fmt: skip


class Launched:
    """`python launch/sweep.py`, with the artifact root given as a relative path."""

    def __init__(self, repo_root: Path, root: Path) -> None:
        self.root = root
        self.command = [sys.executable, str(repo_root / "launch" / "sweep.py"), "--storage-path", "art"]
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *flags: str, **environment: str) -> subprocess.Popen[str]:
        command = [*self.command, *flags]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=self.root, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment, **pipes)
        self.processes.append(process)
        return process

    def run(self, *flags: str, code: int = 0, minutes: float = 5, **environment: str) -> str:
        process = self.start(*flags, **environment)
        out, _ = process.communicate(timeout=60 * minutes)
        assert process.returncode == code, out
        return out

    def folder(self, name: str) -> Path:
        return self.root / "art" / "results" / "digits" / name

    def end(self) -> None:
        """Leave no process behind."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(folder: Path) -> list[Path]:
    return sorted(folder.glob("trials/*/row.json"))


def ray_children(pid: int) -> list[int]:
    """Processes below `pid`, their children included."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in pairs if parent in new} - found
        found |= new
    return sorted(found)


def trial_processes(pid: int) -> list[int]:
    """The slots among the processes below `pid`."""
    return [child for child in ray_children(pid) if "ray::" in (name := command_of(child)) and ".train" in name]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    try:
        return " Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:2]
    except OSError:
        return False
