"""Split sweeps at length: every fault of a table, and a hundred trials in one sweep. Writes tests/benchmarks/results/soak.md."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hamu.training.records import read_trials
from launch.machine import this_machine
from tests.launch.launched import Launched, command_of, ended, is_alive, ray_children, trial_processes, wait_for
from tests.launch.test_split_sweep import GIVEN, SAVED, SPLIT, table, workers

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(1800)]

ERRORS = ("OutOfMemoryError", "AcceleratorError")
# Python runs a `sitecustomize` on its path in every process that starts: the product has no hook for faults.
SITECUSTOMIZE = """
import importlib.abc, importlib.util, os, pathlib, sys


def patch(engine):
    import torch, torch.distributed as dist

    plain, calls = engine.PairedEngine.gradients, []

    def gradients(self, *batches):
        kind, rank, mark = os.environ["INJECT"].split(",")
        calls.append(1)
        if len(calls) == 5 and dist.is_initialized() and dist.get_rank() == int(rank):
            try:
                pathlib.Path(mark).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                raise getattr(torch, kind)("injected")
        return plain(self, *batches)

    engine.PairedEngine.gradients = gradients


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "hamu.training.engine":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        plain = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (plain(module), patch(module))
        return spec


if "INJECT" in os.environ:
    sys.meta_path.insert(0, Finder())
"""
"""Fails the engine's gradients once, on one rank, at its fifth call: what, where and a mark are in the variable INJECT."""


@pytest.fixture(scope="module")
def sweeps(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    launched = Launched(repo_root, tmp_path_factory.mktemp("artifacts"))
    yield launched
    launched.end()


@pytest.fixture(scope="module")
def lines(repo_root: Path) -> Iterator[list[str]]:
    """Lines of the report, written when all tests of this file have run."""
    found: list[str] = []
    yield found
    head = f"# Split sweeps at length\n\n{time.strftime('%Y-%m-%d')}, {this_machine(os.environ).describe()}; n = 1 each.\n\n"
    (repo_root / "tests" / "benchmarks" / "results" / "soak.md").write_text(head + "\n".join(found) + "\n")


def resident_bytes(pids: list[int]) -> int:
    """Memory that the processes hold, pages that they share counted in parts."""
    total = 0
    for pid in pids:
        try:
            rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(row.split()[1]) * 1024 for row in rows if row.startswith("Pss:"))
    return total


@pytest.fixture(scope="module")
def quiet(sweeps: Launched, lines: list[str]) -> tuple[list[dict[str, Any]], float]:
    """The table of a sweep that nothing disturbs, and its seconds."""
    started = time.monotonic()
    sweeps.run("--name", "quiet", *GIVEN, *SAVED, *SPLIT)
    lines += ["| fault in the first of two trials | attempts | seconds more | table equal |", "|---|---|---|---|"]
    return table(sweeps.folder("quiet")), time.monotonic() - started


def kill(find: Callable[[int], list[int]], which: int) -> Callable[[int], None]:
    return lambda pid: os.kill(find(pid)[which], signal.SIGKILL)


STRIKES = {
    "kill-one-worker": kill(workers, 0),
    "kill-the-other-worker": kill(workers, -1),
    "kill-the-tune-actor": kill(trial_processes, 0),
}


@pytest.mark.parametrize("fault", [*STRIKES, *ERRORS])
def test_every_fault_ends_with_the_undisturbed_table(
    sweeps: Launched, quiet: tuple[list[dict[str, Any]], float], lines: list[str], tmp_path: Path, fault: str
) -> None:
    environment = {}
    if fault in ERRORS:
        (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
        path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
        environment = {"INJECT": f"{fault},1,{tmp_path / 'mark'}", "PYTHONPATH": path}
    started = time.monotonic()
    process = sweeps.start("--name", fault, *GIVEN, *SAVED, *SPLIT, **environment)
    folder = sweeps.folder(fault)
    if fault in STRIKES:
        wait_for(lambda: bool(list(folder.glob("trials/*/checkpoint.pt"))), process)
        STRIKES[fault](process.pid)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    attempts = [row["attempts"] for row in read_trials(folder / "trials.parquet")]
    is_equal, more_s = table(folder) == quiet[0], time.monotonic() - started - quiet[1]
    lines.append(f"| {fault} | {attempts} | {more_s:.1f} | {'yes' if is_equal else 'NO'} |")
    assert is_equal
    assert attempts == [2, 1]
    assert fault in STRIKES or (tmp_path / "mark").exists()


def test_a_hundred_trials_in_one_sweep_leave_nothing_behind(sweeps: Launched, lines: list[str]) -> None:
    rates = ",".join(f"{0.001 + 0.0001 * i:.4f}" for i in range(100))
    given = ("--set", "method=ft", "--set", f"lr={rates}", "--set", "epochs=0.2", "--set", "original.num_train_epochs=1")
    process = sweeps.start("--name", "hundred", *given, *SPLIT)
    folder = sweeps.folder("hundred")
    measured: dict[int, tuple[int, int]] = {}
    for n in (10, 99):
        wait_for(lambda n=n: len(ended(folder)) >= n, process)
        pids = ray_children(process.pid)
        measured[n] = (len(pids), resident_bytes(pids))
    below = ray_children(process.pid)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    rows: list[dict[str, Any]] = read_trials(folder / "trials.parquet")
    assert {row["status"] for row in rows} == {"finished"}
    deadline = time.monotonic() + 20
    while any(map(is_alive, below)) and time.monotonic() < deadline:
        time.sleep(0.2)
    left = [command_of(pid) for pid in below if is_alive(pid)]
    lines += ["", "| trials ended | processes | memory |", "|---|---|---|"]
    lines += [f"| {n} | {count} | {held / 2**20:.0f} MiB |" for n, (count, held) in measured.items()]
    warm = json.loads((folder / "summary.json").read_text())["warm_start_s"]
    lines.append(
        f"\n100 trials in one slot; {len(left)} processes left after the end. From the end of a trial to the first step of"
    )
    lines.append(f"the next one: median {warm['median']:.3f} s, longest {warm['max']:.3f} s (n = {warm['n']}).")
    assert not left
    assert warm["n"] == 99
    assert warm["max"] <= 0.3
    assert measured[99][0] <= measured[10][0]
    assert measured[99][1] < 1.05 * measured[10][1] + 20 * 2**20
