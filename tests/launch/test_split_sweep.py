"""Sweeps with `gradient_pairing=split-gpu`: the same table as sequential ones, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hamu.training.records import read_trials
from tests.launch.launched import SHORT, Launched, command_of, ended, is_alive, ray_children, trial_processes, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(420)]

GIVEN = (*SHORT[2:], "--set", "method=hamu-q,ft", "--set", "epochs=2", "--set", "constraint_ratio=0.1")
SAVED = ("--set", "save_strategy=steps", "--set", "save_steps=2")
SPLIT = ("--set", "gradient_pairing=split-gpu", "--set", "num_workers=2", "--set", "ddp_timeout=60")
METRICS = tuple(f"{split}_{metric}" for split in ("retain", "forget", "test") for metric in ("loss", "accuracy", "entropy"))


def workers(pid: int) -> list[int]:
    """Ray Train's processes below a sweep, once they serve."""
    return [child for child in ray_children(pid) if "RayTrainWorker" in command_of(child)]


def table(folder: Path) -> list[dict[str, Any]]:
    rows = read_trials(folder / "trials.parquet")
    return [{name: row[name] for name in ("trial_id", "status", "stop_reason", "steps", *METRICS)} for row in rows]


@pytest.fixture(scope="module")
def sweeps(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    launched = Launched(repo_root, tmp_path_factory.mktemp("artifacts"))
    yield launched
    launched.end()


@pytest.mark.soak  # the faults one by one: test_soak_split.py
def test_a_killed_worker_and_a_killed_tune_actor_change_no_number(sweeps: Launched) -> None:
    sweeps.run("--name", "quiet", *GIVEN, *SAVED, *SPLIT)
    quiet = sweeps.folder("quiet")
    assert json.loads((quiet / "summary.json").read_text())["warm_start_s"]["max"] < 0.3
    process = sweeps.start("--name", "killed", *GIVEN, *SAVED, *SPLIT)
    folder = sweeps.folder("killed")
    first, second = [trial["trial_id"] for trial in json.loads((quiet / "sweep.json").read_text())["trials"]]
    wait_for((folder / "trials" / first / "checkpoint.pt").exists, process)
    killed = workers(process.pid)
    os.kill(killed[-1], signal.SIGKILL)
    wait_for(lambda: len(ended(folder)) == 1 and (folder / "trials" / second / "checkpoint.pt").exists(), process)
    for pid in trial_processes(process.pid):
        os.kill(pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert f"the process of {second} died; the trial goes on from its checkpoint" in out
    assert f"the process of {first} died" not in out  # Tune did not see it
    assert table(folder) == table(quiet)
    assert [row["attempts"] for row in read_trials(folder / "trials.parquet")] == [2, 2]
    assert not any(map(is_alive, killed))


def test_a_split_sweep_ends_with_the_table_of_a_sequential_one(sweeps: Launched) -> None:
    sweeps.run("--name", "split", *GIVEN, *SPLIT)
    assert json.loads((sweeps.folder("split") / "summary.json").read_text())["warm_start_s"]["max"] < 0.3
    sweeps.run("--name", "sequential", *GIVEN)
    for ours, theirs in zip(table(sweeps.folder("split")), table(sweeps.folder("sequential")), strict=True):
        assert ours["steps"] == theirs["steps"]
        for name in METRICS:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name  # float32, summed in another order
