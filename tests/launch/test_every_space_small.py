"""Every experiment of the paper runs to its end on embedded data, and on most of its HAMU trials the constraint can be met.

The long test writes tests/benchmarks/results/small_spaces.md when it has run over all spaces.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hamu.methods.names import HAMU_METHODS
from hamu.training.records import read_trials
from hamu.training.stop import StopReason
from launch.machine import this_machine
from launch.plan import make_plan
from tests.launch.launched import Launched
from tune_spaces.space import list_spaces, load_space

pytestmark = [pytest.mark.ray]

SPACES = [name for name in list_spaces() if name.startswith(("cifar/", "llm/"))]
SHORT = {
    "cifar/full_grad_ablation": (),
    "llm/stopping_criterion": ("--set", "epochs=0.5", "--set", "original.num_train_epochs=4"),
}
"""One of each family that takes seconds, and what makes it so."""
EARLY_STEPS = 5
WANT_OF_A_RATIO = (StopReason.CRITERION, StopReason.INFEASIBLE)


@pytest.fixture(scope="module")
def sweeps(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """One artifact root: spaces of one task share their originals."""
    launched = Launched(repo_root, tmp_path_factory.mktemp("artifacts"))
    yield launched
    launched.end()


@pytest.fixture(scope="module")
def lines(repo_root: Path) -> Iterator[list[str]]:
    found: list[str] = []
    yield found
    if len(found) == len(SPACES):
        (repo_root / "tests" / "benchmarks" / "results" / "small_spaces.md").write_text(page_of(found))


def page_of(lines: Sequence[str]) -> str:
    """The table of all spaces, with its date and machine."""
    head = [
        "# Every space at small scale",
        "",
        f"`make soak`, {time.strftime('%Y-%m-%d')}, {this_machine(os.environ).describe()}; n = 1 each. Early: ended within",
        f"{EARLY_STEPS} steps since no step could meet the ratio asked for. Forgot: median rise of the forget loss, nats.",
        "",
        "| space | trials | of HAMU | early | ended by criterion or infeasible | forgot | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *lines]) + "\n"


def line_of(space: str, rows: Sequence[dict[str, Any]]) -> str:
    """A sweep in a line of the table; its seconds are those of the trials, without the original."""
    hamu = [row for row in rows if row["method"] in HAMU_METHODS]
    ended = sum(row["stop_reason"] in WANT_OF_A_RATIO for row in hamu)
    rises = [row["forget_quality"] for row in hamu if row["forget_quality"] is not None]
    forgot = f"{statistics.median(rises):.2f}" if rises else "-"
    seconds = max(row["ended_at"] for row in rows) - min(row["started_at"] for row in rows)
    return f"| {space} | {len(rows)} | {len(hamu)} | {len(early(hamu))} | {ended} | {forgot} | {seconds:.0f} |"


def run_small(sweeps: Launched, space: str, *more: str, minutes: float) -> list[dict[str, Any]]:
    task, name = space.split("/")
    sweeps.run("--space", space, "--scale", "small", "--name", name, *more, minutes=minutes)
    rows = read_trials(sweeps.root / "art" / "results" / task / name / "trials.parquet")
    n_trials = len(make_plan(load_space(space), name=name, overrides={}, root=Path("art"), scale="small").trials)
    assert len(rows) == n_trials
    assert {row["status"] for row in rows} <= {"finished", "pruned"}
    return rows


def early(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Trials that ended within a few steps, since no step could meet the ratio that they asked for."""
    return [row["trial_id"] for row in rows if row["steps"] <= EARLY_STEPS and row["stop_reason"] in WANT_OF_A_RATIO]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("space", SHORT)
def test_a_space_of_each_family_runs_to_its_end_at_small_scale(sweeps: Launched, space: str) -> None:
    rows = run_small(sweeps, space, *SHORT[space], minutes=5)
    assert len(early(rows)) <= len(rows) / 4
    assert all(row["relative_constraint"] and row["steps"] > 0 for row in rows)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("space", SPACES)
def test_every_space_runs_to_its_end_at_small_scale_and_its_constraints_can_mostly_be_met(
    sweeps: Launched, lines: list[str], space: str
) -> None:
    rows = run_small(sweeps, space, minutes=55)
    lines.append(line_of(space, rows))
    hamu = [row for row in rows if row["method"] in HAMU_METHODS]
    assert len(early(hamu)) <= len(hamu) / 4, f"{len(early(hamu))} of {len(hamu)}: {early(hamu)}"
    if hamu and not space.endswith("/timing_all"):  # which evaluates nothing
        assert statistics.median(row["forget_quality"] for row in hamu) > 0.05  # nats: something was forgotten
