"""Every experiment of the paper runs to its end on embedded data, and on most of its HAMU trials the constraint can be met."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hamu.methods.names import HAMU_METHODS
from hamu.training.records import read_trials
from hamu.training.stop import StopReason
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


def run_small(sweeps: Launched, space: str, *more: str, minutes: float) -> list[dict[str, Any]]:
    task, name = space.split("/")
    sweeps.run("--space", space, "--scale", "small", "--name", name, *more, minutes=minutes)
    rows = read_trials(sweeps.root / "art" / "results" / task / name / "trials.parquet")
    n_trials = len(make_plan(load_space(space), name=name, overrides={}, root=Path("art"), scale="small").trials)
    assert len(rows) == n_trials
    assert {row["status"] for row in rows} <= {"finished", "pruned"}
    return rows


def early(rows: list[dict[str, Any]]) -> list[str]:
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
def test_every_space_runs_to_its_end_at_small_scale_and_its_constraints_can_mostly_be_met(sweeps: Launched, space: str) -> None:
    rows = run_small(sweeps, space, minutes=55)
    hamu = [row for row in rows if row["method"] in HAMU_METHODS]
    assert len(early(hamu)) <= len(hamu) / 4, f"{len(early(hamu))} of {len(hamu)}: {early(hamu)}"
    if hamu and not space.endswith("/timing_all"):  # which evaluates nothing
        assert statistics.median(row["forget_quality"] for row in hamu) > 0.05  # nats: something was forgotten
