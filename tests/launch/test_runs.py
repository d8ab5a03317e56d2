"""When trials ran is kept for each run of a sweep, also of one that is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

import launch.runs
from launch.runs import Runs, read_runs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as a list of one number to be set."""
    now = [1000.0]
    monkeypatch.setattr(launch.runs.time, "time", lambda: now[0])
    monkeypatch.setattr(launch.runs.time, "monotonic", lambda: now[0])
    return now


def test_a_run_lasts_from_the_first_slot_to_the_last_word_of_a_trial(tmp_path: Path, clock: list[float]) -> None:
    path = tmp_path / "runs.json"
    for start in (1000.0, 5000.0):
        clock[0] = start
        with Runs(path) as runs:
            for at in (10.0, 11.0, 12.5):
                clock[0] = start + at
                runs.note()
            clock[0] = start + 100.0
    assert read_runs(path) == [{"started_at": start, "ended_at": start + 12.5} for start in (1000.0, 5000.0)]


def test_a_killed_run_is_known_to_within_seconds(tmp_path: Path, clock: list[float]) -> None:
    path = tmp_path / "runs.json"
    runs = Runs(path).__enter__()  # whose context is never left
    for _ in range(20):
        clock[0] += 3.0
        runs.note()
    [entry] = read_runs(path)
    assert 54.0 <= entry["ended_at"] - entry["started_at"] <= 60.0


def test_a_run_without_a_trial_leaves_nothing(tmp_path: Path) -> None:
    with Runs(tmp_path / "runs.json"):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs.json").write_text("[{")
    assert read_runs(tmp_path / "runs.json") == []
