"""The same sweep of twelve trials under every fault of a table: equal results to the bit, nothing that ended run again.

Writes tests/benchmarks/results/faults.md. One fault alone: `-k "drained and replaced"`; the table keeps the rows of the others.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from launch.machine import this_machine
from tests.launch.disturbed import PAIRINGS, TWELVE, Disturbed
from tests.launch.launched import trial_processes
from tests.two_nodes import TwoNodes, skip_reason

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(900)]

STOP_S = 15.0
"""A sweep that is told to stop has stopped after so many seconds."""
SAID_S = 60.0
"""What waits for what is told after so many seconds."""
HEADINGS = ("fault", "where", "when", "s more", "attempts beyond 12", "table equal", "run again", "notes")
Place = Literal["one machine", "two nodes", "a tmpfs"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """strike: does it to a running sweep in whose middle it is called, and leaves it running; returns a note.

    n_again: trials that had ended and have to run again, since the fault destroyed what they wrote.
    cpus: of the head and of the worker.
    """

    strike: Callable[[Disturbed, TwoNodes | None], str]
    pairing: str
    when: str = "4 trials ended, a checkpoint written"
    place: Place = "one machine"
    n_again: int = 0
    cpus: tuple[float, float] = (1, 1)


def kill_a_worker(sweep: Disturbed, nodes: TwoNodes | None) -> str:
    os.kill(sweep.named("RayTrainWorker")[-1], signal.SIGKILL)
    return ""


def kill_a_tune_actor(sweep: Disturbed, nodes: TwoNodes | None) -> str:
    os.kill(trial_processes(sweep.process.pid)[0], signal.SIGKILL)
    return ""


def kill_the_driver(sweep: Disturbed, nodes: TwoNodes | None) -> str:
    sweep.kill()
    sweep.note_ended()
    sweep.resume()
    return "--resume"


def terminate_the_driver(sweep: Disturbed, nodes: TwoNodes | None) -> str:
    steps = saved_steps(sweep)
    took = sweep.terminate()
    sweep.note_ended()
    assert took < STOP_S, sweep.said
    assert sweep.checkpoints(), "the running trials were saved"
    saved = saved_steps(sweep)
    assert all(saved[path] >= step for path, step in steps.items() if path in saved)
    sweep.resume()
    return f"stopped after {took:.1f} s, --resume"


def kill_node_and_replace(sweep: Disturbed, nodes: TwoNodes | None) -> str:
    assert nodes is not None
    killed_at = time.monotonic()
    nodes.worker.kill()
    sweep.wait_for_words(rf"node {re.escape(nodes.worker.ip)} was lost", SAID_S)
    lost_s = time.monotonic() - killed_at
    sweep.wait_until(lambda: re.search(r"waits? for", sweep.said) is not None, SAID_S - lost_s)
    waits_s = time.monotonic() - killed_at
    sweep.note_ended()
    nodes.worker.start()
    return f"loss said after {lost_s:.0f} s, what waits for what after {waits_s:.0f} s"


def kill_node(sweep: Disturbed, nodes: TwoNodes | None) -> str:
    assert nodes is not None
    nodes.worker.kill()
    took = sweep.wait_for_words(rf"node {re.escape(nodes.worker.ip)} was lost", SAID_S)
    return f"loss said after {took:.0f} s; the head goes on alone"


def drain_node(sweep: Disturbed, nodes: TwoNodes | None) -> str:
    assert nodes is not None
    started = time.monotonic()
    nodes.worker.drain(deadline_s=20)
    sweep.wait_until(lambda: not busy(nodes.worker.pids()), 20)
    left_s = time.monotonic() - started
    sweep.wait_until(lambda: time.monotonic() > started + 20, 30)
    nodes.worker.kill()
    return f"trial left the node {left_s:.1f} s after the notice, deadline 20 s"


def drain_node_and_replace(sweep: Disturbed, nodes: TwoNodes | None) -> str:
    note = drain_node(sweep, nodes)
    assert nodes is not None
    nodes.worker.start()
    return note + "; then a new node"


def cut_network(sweep: Disturbed, nodes: TwoNodes | None) -> str:
    assert nodes is not None
    nodes.cut()
    time.sleep(30)
    nodes.mend()
    # Ray ends a node that it could not reach; a machine that stands is then joined again by its service manager.
    deadline = time.monotonic() + 45
    while time.monotonic() < deadline and sweep.process.poll() is None:
        if not nodes.worker.has_raylet():
            nodes.worker.kill()
            nodes.worker.start()
            return "Ray gave the node up; it joined anew"
        time.sleep(0.5)
    return "the node stayed"


def lose_the_head(sweep: Disturbed, nodes: TwoNodes | None) -> str:
    assert nodes is not None
    nodes.head.kill()  # the driver with it
    sweep.process.wait()
    nodes.worker.kill()
    sweep.note_ended()
    nodes.head.start()
    nodes.worker.start()
    nodes.wait_for_nodes(2)
    sweep.resume()
    return "both machines off and on, --resume"


def fill_storage(sweep: Disturbed, nodes: TwoNodes | None) -> str:
    balloon = sweep.root / "balloon"
    fill(balloon)
    took = sweep.wait_for_words("is full", SAID_S)
    fill(balloon)  # what was freed since by a file that was replaced
    sweep.note_ended()
    time.sleep(10)
    assert sweep.process.poll() is None, sweep.said
    balloon.unlink()
    return f"said after {took:.1f} s, freed 10 s later"


def truncate_checkpoint(sweep: Disturbed, nodes: TwoNodes | None) -> str:
    sweep.kill()
    sweep.note_ended()
    path = sweep.checkpoints()[0]
    os.truncate(path, path.stat().st_size // 2)
    sweep.resume()
    sweep.wait_until(lambda: any(path.parent.glob("checkpoint.pt.corrupt-*")), 120)
    sweep.wait_until(lambda: f"trial {path.parent.name} begins anew" in sweep.said, 60)
    return "killed, half of the file cut off, --resume: set aside, trial begun anew"


def cut_record_of_running(sweep: Disturbed, nodes: TwoNodes | None) -> str:
    sweep.kill()
    sweep.note_ended()
    parts = sorted((sweep.folder / "records").glob("*-[0-9][0-9][0-9][0-9][0-9].parquet"))
    os.truncate(parts[0], parts[0].stat().st_size // 2)
    sweep.resume()
    return "killed, half of an unfinished trial's part cut off, --resume"


def cut_record_of_ended(sweep: Disturbed, nodes: TwoNodes | None) -> str:
    sweep.kill()
    sweep.note_ended()
    path = sweep.folder / "records" / f"{sorted(sweep.before)[0]}.parquet"
    os.truncate(path, path.stat().st_size // 2)
    sweep.resume()
    sweep.wait_until(lambda: any(path.parent.glob(f"{path.name}.corrupt-*")), 120)
    return "killed, half of an ended trial's file cut off, --resume: set aside, that trial run again"


FAULTS = {
    "kill -9 of a training worker": Fault(strike=kill_a_worker, pairing="split"),
    "kill -9 of a Tune actor": Fault(strike=kill_a_tune_actor, pairing="sequential"),
    "kill -9 of a Tune actor that holds workers": Fault(strike=kill_a_tune_actor, pairing="split"),
    "kill -9 of the driver": Fault(strike=kill_the_driver, pairing="sequential"),
    "kill -9 of the driver of split pairs": Fault(strike=kill_the_driver, pairing="split"),
    "SIGTERM to the driver": Fault(strike=terminate_the_driver, pairing="sequential"),
    "SIGTERM to the driver of split pairs": Fault(strike=terminate_the_driver, pairing="split"),
    "worker node killed, replaced": Fault(strike=kill_node_and_replace, pairing="split", place="two nodes"),
    "worker node killed, not replaced": Fault(strike=kill_node, pairing="sequential", place="two nodes"),
    "worker node drained": Fault(strike=drain_node, pairing="sequential", place="two nodes"),
    "worker node drained, replaced": Fault(strike=drain_node_and_replace, pairing="split", place="two nodes"),
    "network cut for 30 s": Fault(strike=cut_network, pairing="split", place="two nodes"),
    "both nodes lost, driver with them": Fault(strike=lose_the_head, pairing="split", place="two nodes"),
    "storage full, then freed": Fault(strike=fill_storage, pairing="sequential", place="a tmpfs"),
    "storage full under split pairs": Fault(strike=fill_storage, pairing="split", place="a tmpfs"),
    "checkpoint truncated": Fault(strike=truncate_checkpoint, pairing="sequential"),
    "checkpoint of split pairs truncated": Fault(strike=truncate_checkpoint, pairing="split"),
    "record file of a running trial cut": Fault(strike=cut_record_of_running, pairing="sequential"),
    "record file of an ended trial cut": Fault(strike=cut_record_of_ended, pairing="sequential", n_again=1),
}


def busy(pids: list[int]) -> bool:
    """Whether a trial's process is among them."""
    for pid in pids:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text()
            if "RayTrainWorker" in command or "UnlearningTrial" in command or ".train" in command:
                return True
    return False


def saved_steps(sweep: Disturbed) -> dict[Path, float]:
    """When each checkpoint of a trial that has not ended was written."""
    found = {}
    for path in sweep.checkpoints():
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat().st_mtime
    return found


def fill(path: Path) -> None:
    """Write until nothing more fits on the disk."""
    with path.open("ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int = 48) -> Iterator[Path]:
    path.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


class Quiet:
    """Sweeps that nothing disturbs, each run once: their tables and seconds."""

    def __init__(self, repo_root: Path, base: Path) -> None:
        self._repo_root, self._base = repo_root, base
        self._known: dict[tuple[str, bool], tuple[list[str], float]] = {}

    def of(self, pairing: str, nodes: TwoNodes | None) -> tuple[list[str], float]:
        """Table and seconds; with nodes: on those."""
        key = (pairing, nodes is not None)
        if key not in self._known:
            name = f"quiet-{pairing}-{'nodes' if nodes else 'here'}"
            sweep = Disturbed(self._repo_root, self._base / name, name, self._base / f"{name}.out", nodes)
            started = time.monotonic()
            sweep.start(*TWELVE, *PAIRINGS[pairing])
            try:
                sweep.end()
            finally:
                sweep.close()
            self._known[key] = (sweep.table(), time.monotonic() - started)
            assert sweep.attempts() == [1] * 12
        return self._known[key]


@pytest.fixture(scope="module")
def quiet(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Quiet:
    return Quiet(repo_root, tmp_path_factory.mktemp("quiet"))


class Table:
    """The rows by fault, in a file that is written with each one; those that are not run now are kept as they stand there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, str] = {}
        if path.exists():
            self._rows = {line.split("|")[1].strip(): line for line in path.read_text().splitlines() if line.startswith("| ")}

    def add(self, fault: str, row: str) -> None:
        self._rows[fault] = row
        self._path.write_text(self.text())

    def text(self) -> str:
        head = [
            "# Faults",
            "",
            f"{time.strftime('%Y-%m-%d')}, {this_machine(os.environ).describe()}; n = 1 each.",
            "One sweep of 12 trials on digits, CPU, fixed seeds, of 44 steps each, or 22 of split pairs. Two nodes: Ray's, in",
            "two network namespaces of this machine, a core each. `s more`: than the same sweep undisturbed in the same place,",
            "the time of the fault included. Table equal: every result of every trial and every recorded row of every step, to",
            "the bit, to those of the undisturbed sweep on one machine. Run again: trials that had ended before the fault and",
            "whose row was written anew.",
            "",
            f"| {' | '.join(HEADINGS)} |",
            "|" + "---|" * len(HEADINGS),
        ]
        return "\n".join([*head, *(self._rows[name] for name in FAULTS if name in self._rows)]) + "\n"


@pytest.fixture(scope="module")
def rows(repo_root: Path, request: pytest.FixtureRequest) -> Iterator[Table]:
    """The table, printed at the end."""
    table = Table(repo_root / "tests" / "benchmarks" / "results" / "faults.md")
    yield table
    request.config.pluginmanager.get_plugin("terminalreporter").write_line(f"\n{table.text()}")


@pytest.fixture
def place(name: str, tmp_path: Path) -> Iterator[tuple[Path, TwoNodes | None]]:
    """Artifact root, and the cluster."""
    fault = FAULTS[name]
    with contextlib.ExitStack() as stack:
        if fault.place == "a tmpfs":
            yield stack.enter_context(small_disk(tmp_path / "disk")) / "art", None
        elif fault.place == "two nodes":
            if reason := skip_reason():
                pytest.skip(reason)
            yield tmp_path / "art", stack.enter_context(TwoNodes(cpus=fault.cpus))
        else:
            yield tmp_path / "art", None


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_ends_with_the_undisturbed_table(
    repo_root: Path,
    quiet: Quiet,
    rows: Table,
    place: tuple[Path, TwoNodes | None],
    name: str,
    tmp_path: Path,
) -> None:
    fault, (root, nodes) = FAULTS[name], place
    expected, _ = quiet.of(fault.pairing, None)
    _, quiet_s = quiet.of(fault.pairing, nodes)
    sweep = Disturbed(repo_root, root, re.sub(r"\W+", "-", name), tmp_path / "out", nodes)
    started = time.monotonic()
    sweep.start(*TWELVE, *PAIRINGS[fault.pairing])
    try:
        sweep.wait_for_middle()
        note = fault.strike(sweep, nodes)
        sweep.end()
    finally:
        sweep.close()
        sys.stdout.write(sweep.said)
    more_s, again = time.monotonic() - started - quiet_s, sweep.ran_again()
    is_equal = sweep.table() == expected
    cells = [name, f"{fault.place}, {fault.pairing}", fault.when, f"{more_s:.0f}", str(sum(sweep.attempts()) - 12)]
    cells += ["yes" if is_equal else "NO", str(len(again)), note]
    rows.add(name, f"| {' | '.join(cells)} |")
    assert is_equal
    assert len(again) == fault.n_again, again


def test_the_same_sweep_has_the_same_table_on_one_machine_and_on_two(quiet: Quiet) -> None:
    if reason := skip_reason():
        pytest.skip(reason)
    with TwoNodes(cpus=(1, 1)) as nodes:
        for pairing in PAIRINGS:
            assert quiet.of(pairing, nodes)[0] == quiet.of(pairing, None)[0]
