"""A saved state takes the place of a trial's checkpoint once, and only as long as it is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hamu.errors import CheckpointError
from launch.states import STATE, drop_foreign_state, drop_states, metrics_of, next_folder, take_state, write_origin


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state of trial a, recipe one."""
    folder = next_folder(tmp_path / "a")
    (folder / STATE).write_text("of a")
    write_origin(folder, trial_id="a", recipe="one", metrics={"step": 4})
    return folder


def take(state: Path, trial: str, recipe: str) -> bool:
    return take_state(state, state.parents[2] / trial, trial_id=trial, recipe=recipe)


def test_a_state_of_another_trial_or_recipe_is_foreign(state: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    assert take(state, "a", "one") is False
    assert take(state, "a", "two") is True
    assert take(state, "b", "one") is True
    assert (tmp_path / "b" / "checkpoint.pt").read_text() == "of a"
    assert metrics_of(state) == {"step": 4}


def test_a_trial_that_is_begun_again_with_its_state_keeps_what_it_saved_since(state: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "b" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    assert take(state, "b", "two") is True
    assert take(state, "b", "two") is True  # nothing was saved since
    os.utime(checkpoint, ns=(1, 1))  # as of a copy on another machine
    assert take(state, "b", "two") is True
    checkpoint.unlink()
    checkpoint.write_text("of b")
    assert take(state, "b", "two") is False
    assert checkpoint.read_text() == "of b"


def test_a_checkpoint_taken_for_settings_that_nobody_asks_for_goes(state: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    take(state, "b", "two")
    drop_foreign_state(tmp_path / "b", recipe="two")
    assert (tmp_path / "b" / "checkpoint.pt").exists()
    drop_foreign_state(tmp_path / "b", recipe="one")
    assert not (tmp_path / "b" / "checkpoint.pt").exists()


def test_only_the_newest_states_of_a_trial_are_kept(tmp_path: Path) -> None:
    names = [next_folder(tmp_path).name for _ in range(12)]
    assert names == [str(n) for n in range(12)]
    assert sorted(int(path.name) for path in (tmp_path / "states").iterdir()) == [8, 9, 10, 11]
    drop_states(tmp_path)
    assert not (tmp_path / "states").exists()


def test_a_state_that_is_gone_is_said(state: Path) -> None:
    (state / STATE).unlink()
    with pytest.raises(CheckpointError, match="no saved state in"):
        take(state, "a", "one")
