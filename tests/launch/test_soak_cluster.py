"""Three hundred short split trials in one sweep: memory stays what it was, and nothing is left. Writes soak_300.md."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hamu.training.records import read_trials
from launch.machine import this_machine
from tests.launch.disturbed import AGENTS, SPLIT, Disturbed
from tests.launch.launched import command_of, ended
from tests.two_nodes import TwoNodes, skip_reason

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(3600)]

N_TRIALS = 300
SETTLED = 50
"""Trials after which memory is to be flat."""
GROWTH = 0.05
RATES = ",".join(f"{0.001 + 0.0001 * i:.4f}" for i in range(N_TRIALS))
TRIALS = (
    "--set", "method=ft", "--set", f"lr={RATES}", "--set", "epochs=0.2", "--set", "original.num_train_epochs=1", *SPLIT,
)  # fmt: skip
WINDOW = 25
"""Samples are taken once a trial; a figure is the median of so many, since garbage is collected when it pleases."""


@dataclass(frozen=True)
class Sample:
    """Bytes that the processes hold (pages that they share counted in parts), when so many trials had ended."""

    n_ended: int
    driver: int
    workers: int
    others: int


@pytest.fixture
def nodes() -> Iterator[TwoNodes]:
    if reason := skip_reason():
        pytest.skip(reason)
    with TwoNodes(cpus=(1, 1)) as nodes:
        yield nodes


def held_bytes(pid: int) -> int:
    try:
        rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(row.split()[1]) * 1024 for row in rows if row.startswith("Pss:"))


def sample(sweep: Disturbed, pids: list[int]) -> Sample:
    workers = {pid for pid in pids if "RayTrainWorker" in command_of(pid)}
    others = set(pids) - workers - {sweep.process.pid}
    n_ended = len(ended(sweep.folder))
    return Sample(n_ended, held_bytes(sweep.process.pid), sum(map(held_bytes, workers)), sum(map(held_bytes, others)))


def median_around(samples: list[Sample], name: str, n_ended: int) -> float:
    """Of the samples from n_ended on, and of the last ones where there are no later ones."""
    chosen = [getattr(each, name) for each in samples if each.n_ended >= n_ended][:WINDOW]
    return statistics.median(chosen if len(chosen) == WINDOW else [getattr(each, name) for each in samples[-WINDOW:]])


def test_three_hundred_split_trials_hold_no_more_memory_than_fifty(
    repo_root: Path, tmp_path: Path, nodes: TwoNodes, request: pytest.FixtureRequest
) -> None:
    """On a cluster that stays when the sweep has gone, so that what it leaves there can be seen."""
    sweep = Disturbed(repo_root, tmp_path / "art", "soak", tmp_path / "out", nodes)
    started = time.monotonic()
    sweep.start(*TRIALS)
    samples: list[Sample] = []
    while sweep.process.poll() is None:
        n = len(ended(sweep.folder))
        if n > (samples[-1].n_ended if samples else 0):
            samples.append(sample(sweep, [*nodes.head.pids(), *nodes.worker.pids()]))
        time.sleep(0.1)
    took = time.monotonic() - started
    sweep.end()
    assert {row["status"] for row in read_trials(sweep.folder / "trials.parquet")} == {"finished"}
    assert len(ended(sweep.folder)) == N_TRIALS
    left = left_behind(nodes)
    marks = (10, SETTLED, 100, 150, 200, 250, N_TRIALS)
    rows = [[n, *(median_around(samples, name, n) / 2**20 for name in ("driver", "workers", "others"))] for n in marks]
    growth = {
        name: median_around(samples, name, N_TRIALS) / median_around(samples, name, SETTLED) - 1 for name in ("driver", "workers")
    }
    request.config.pluginmanager.get_plugin("terminalreporter").write_line(write(repo_root, rows, growth, left, took))
    assert left == {"processes": [], "actors": [], "placement groups": []}
    assert max(growth.values()) < GROWTH, growth


def left_behind(nodes: TwoNodes) -> dict[str, list[str]]:
    """What of the sweep is there half a minute after its end at the latest."""
    deadline = time.monotonic() + 30
    while True:
        pids = [*nodes.head.pids(), *nodes.worker.pids()]
        names = [command_of(pid).replace("\0", " ").strip() for pid in pids]
        actors = nodes.get("/api/v0/actors?limit=10000")["data"]["result"]["result"]
        groups = nodes.get("/api/v0/placement_groups?limit=10000")["data"]["result"]["result"]
        left = {
            "processes": [name for name in names if "ray::" in name and not name.startswith(("ray::IDLE", *AGENTS))],
            "actors": [each["class_name"] for each in actors if each["state"] != "DEAD"],
            "placement groups": [each["placement_group_id"] for each in groups if each["state"] != "REMOVED"],
        }
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


def write(repo_root: Path, rows: list[list[float]], growth: dict[str, float], left: dict[str, list[str]], took: float) -> str:
    """Write the table, and return it."""
    lines = [
        "# Three hundred split trials in one sweep",
        "",
        f"{time.strftime('%Y-%m-%d')}, {this_machine(os.environ).describe()}; n = 1. Two nodes in two network",
        f"namespaces, a core and a worker of each pair on each; {took:.0f} s. PSS in MiB, medians of {WINDOW} samples, one a",
        "trial; others: Ray's own processes.",
        "",
        "| trials ended | driver | two workers | others |",
        "|---|---|---|---|",
        *(f"| {n:.0f} | {driver:.0f} | {workers:.0f} | {others:.0f} |" for n, driver, workers, others in rows),
        "",
        f"Growth after trial {SETTLED}: driver {growth['driver']:+.1%}, workers {growth['workers']:+.1%}. Left after the end: "
        + ", ".join(f"{len(what)} {name}" for name, what in left.items())
        + ".",
    ]
    text = "\n".join(lines) + "\n"
    (repo_root / "tests" / "benchmarks" / "results" / "soak_300.md").write_text(text)
    return f"\n{text}"
