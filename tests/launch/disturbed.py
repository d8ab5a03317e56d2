"""A sweep that is disturbed while it runs: what had ended by then, what it says, and whether its table stays what it was."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hamu.training.records import RECORD_SCHEMA, TRIAL_SCHEMA, read_records, read_trials
from tests.launch.launched import command_of, ended, is_alive, ray_children
from tests.two_nodes import TwoNodes

TWELVE = (
    "--set", "method=hamu-q,ft,gdiff", "--set", "lr=0.01,0.02,0.03,0.04", "--set", "constraint_ratio=0.1",
    "--set", "original.num_train_epochs=1", "--set", "save_strategy=steps", "--set", "save_steps=2",
)  # fmt: skip
SPLIT = ("--set", "gradient_pairing=split-gpu", "--set", "num_workers=2", "--set", "ddp_timeout=60")
# Of 11 steps an epoch: as long as a fault takes to come, and a step of a pair takes longer on two cores.
PAIRINGS: dict[str, tuple[str, ...]] = {"sequential": ("--set", "epochs=4"), "split": ("--set", "epochs=2", *SPLIT)}
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
# Of the run itself: how long it took, what it held, where it lay.
_OF_THE_RUN = re.compile(r"sweep|.*_s|.*_at|attempts|.*_bytes.*|model_path|config")
_RESULTS = [name for name in TRIAL_SCHEMA.names if not _OF_THE_RUN.fullmatch(name)]
_RECORDED = [name for name in RECORD_SCHEMA.names if not _OF_THE_RUN.fullmatch(name)]


class Disturbed:
    """One run of `python launch/sweep.py` over a folder, and its `--resume`.

    Args:
        repo_root: of this repository.
        root: artifact root.
        name: of the sweep.
        output: file that takes what it prints.
        nodes: the cluster to join from its head; None: a Ray of the sweep's own, on this machine.
    """

    def __init__(self, repo_root: Path, root: Path, name: str, output: Path, nodes: TwoNodes | None = None) -> None:
        self.name, self.root, self._nodes = name, root, nodes
        joins = [] if nodes is None else ["--address", nodes.address]
        self._command = [sys.executable, str(repo_root / "launch" / "sweep.py"), "--storage-path", str(root), *joins]
        self.folder = root / "results" / "digits" / name
        self.before: dict[str, tuple[int, int]] = {}
        self._output = output
        self._output.parent.mkdir(parents=True, exist_ok=True)
        self._output.write_text("")

    def start(self, *flags: str) -> None:
        self._run("--name", self.name, *flags)

    def resume(self) -> None:
        self._run("--resume", self.name)

    def _run(self, *flags: str) -> None:
        with self._output.open("a") as out:
            given: dict[str, Any] = {"stdout": out, "stderr": subprocess.STDOUT, "text": True}
            command = [*self._command, *flags]
            if self._nodes is not None:
                self.process = self._nodes.start(command, where="head", **given)
            else:
                environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
                self.process = subprocess.Popen(command, env=environment, **given)

    @property
    def said(self) -> str:
        """What it has printed up to now, all runs of it."""
        return self._output.read_text()

    def below(self) -> list[int]:
        """Processes below the driver."""
        return ray_children(self.process.pid)

    def named(self, word: str) -> list[int]:
        """Processes whose command has the word: below the driver, or on the two nodes."""
        pids = self.below() if self._nodes is None else [*self._nodes.head.pids(), *self._nodes.worker.pids()]
        return [pid for pid in pids if word in command_of(pid)]

    def wait_until(self, condition: Callable[[], bool], seconds: float = 240) -> float:
        """Wait while it runs; returns the seconds."""
        started = time.monotonic()
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < started + seconds, self.said
            time.sleep(0.02)
        return time.monotonic() - started

    def wait_for_words(self, pattern: str, seconds: float = 240) -> float:
        n = len(self.said)
        return self.wait_until(lambda: re.search(pattern, self.said[n:]) is not None, seconds)

    def wait_for_middle(self, n_ended: int = 4) -> None:
        """Wait until some trials have ended and one that has not has a checkpoint; note those that have ended."""
        self.wait_until(lambda: len(ended(self.folder)) >= n_ended and bool(self.checkpoints()))
        self.note_ended()

    def note_ended(self) -> None:
        """Remember which trials have ended: none of them may run again."""
        self.before = self._stamps()

    def checkpoints(self) -> list[Path]:
        """Of the trials that have not ended."""
        return [path for path in self.folder.glob("trials/*/checkpoint.pt") if not (path.parent / "row.json").exists()]

    def kill(self) -> None:
        """`kill -9` of the driver; returns when its workers are gone, which takes Ray seconds (its agents take minutes)."""
        workers = [pid for pid in self.below() if command_of(pid).startswith("ray::") and not command_of(pid).startswith(AGENTS)]
        self.process.kill()
        self.process.wait()
        deadline = time.monotonic() + 60
        while left := [command_of(pid).partition("\0")[0] for pid in workers if is_alive(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)

    def terminate(self) -> float:
        """SIGTERM to the driver; returns the seconds that it took to stop."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=60) == 128 + signal.SIGTERM, self.said
        return time.monotonic() - started

    def end(self, seconds: float = 420) -> None:
        """Wait for the end, which is to be a good one."""
        assert self.process.wait(timeout=seconds) == 0, self.said

    def close(self) -> None:
        """Leave no process behind."""
        if self.process.poll() is None:
            self.kill()

    def ran_again(self) -> list[str]:
        """Trials that had ended when `note_ended` was called, and whose row has been written anew since."""
        now = self._stamps()
        return [trial_id for trial_id, stamp in self.before.items() if now.get(trial_id) != stamp]

    def attempts(self) -> list[int]:
        """Of each trial, in the order of the plan."""
        return [row["attempts"] for row in read_trials(self.folder / "trials.parquet")]

    def table(self) -> list[str]:
        """The final table, and every recorded row of every step: all but times, memory and places. Equal texts, equal bits."""
        rows = [{name: row[name] for name in _RESULTS} for row in read_trials(self.folder / "trials.parquet")]
        records = read_records(self.folder / "records").select(_RECORDED).to_pylist()
        return [*map(repr, rows), *sorted(map(repr, records))]

    def _stamps(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in ended(self.folder):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                found[path.parent.name] = (stat.st_ino, stat.st_mtime_ns)
        return found
