"""The driver tells what became of trials whose rows are late, broken or missing, and never writes over one."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from rich.console import Console

import launch.follow
from launch.follow import MAX_BARREN, Follow, write_row
from launch.live import Board
from launch.plan import make_plan
from launch.results import SweepFolder, write_json
from launch.shared import failed_row
from launch.signals import Signals
from tune_spaces.space import load_space

ENDED = {"said": '{"status": "finished", "step": 3}'}


class Driven:
    """A sweep whose driver follows trials that nobody runs."""

    def __init__(self, root: Path) -> None:
        overrides = {"unlearning_method": ("ft",), "learning_rate": (0.01,), "hard_probability": (0.0, 0.5)}
        self.plan = make_plan(load_space("digits/quickstart"), name="mine", overrides=overrides, root=root)
        self.folder = SweepFolder(root / "mine")
        self.folder.start(self.plan)
        self.first = self.plan.trials[0].trial_id
        self.path = self.folder.trial(self.first) / "row.json"
        self.out = io.StringIO()
        self.told: list[tuple[str, str]] = []
        board = Board(self.plan, Console(file=self.out, width=400))
        self.follow = Follow(
            self.plan, self.folder, board, Signals(), tell=lambda key, row: self.told.append((key, row["status"]))
        )

    def trial(self, **last: Any) -> Trial:
        trial = Trial("x", stub=True, config={"trial_id": self.first}, trial_name_creator=lambda each: self.first)
        trial.run_metadata.last_result = last
        trial.storage = SimpleNamespace(trial_driver_staging_path="")  # without a file of what it died of
        return trial

    def write(self, status: str) -> None:
        row = {**failed_row(self.plan, self.plan.trials[0], "x"), "status": status, "error": None, "stop_reason": status}
        write_row(self.folder, self.first, row)


@pytest.fixture
def driven(tmp_path: Path) -> Driven:
    return Driven(tmp_path)


@pytest.mark.parametrize("event", ["on_trial_complete", "on_trial_error"])
def test_a_row_that_is_late_is_waited_for_while_tune_goes_on(driven: Driven, monkeypatch: pytest.MonkeyPatch, event: str) -> None:
    monkeypatch.setattr(launch.follow, "_SEEN_WITHIN_S", 0.0)
    monkeypatch.setattr(launch.follow, "_LOOK_EVERY_S", 0.0)
    getattr(driven.follow, event)(0, [], driven.trial(**ENDED))
    for _ in range(3):
        driven.follow.on_step_begin(0, [])
    assert not driven.path.exists()
    assert driven.told == []
    assert driven.out.getvalue().count("is not to be seen yet; looking on") == 1
    driven.write("finished")
    driven.follow.on_step_begin(0, [])
    driven.follow.on_step_begin(0, [])
    assert driven.told == [(driven.first, "finished")]


def test_a_row_that_comes_as_the_last_trial_ends_is_told(driven: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    driven.follow.on_trial_complete(0, [], driven.trial(**ENDED))
    monkeypatch.setattr("time.sleep", lambda seconds: driven.write("finished"))
    driven.follow.on_experiment_end([])
    assert driven.told == [(driven.first, "finished")]
    assert "did not come" not in driven.out.getvalue()


def test_a_row_that_never_comes_is_said_and_its_trial_is_left_open(driven: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.follow, "_WAIT_FOR_ROWS_S", 0.1)
    driven.follow.on_trial_complete(0, [], driven.trial(**ENDED))
    driven.follow.on_experiment_end([])
    assert f"the row of {driven.first} did not come within 0.1 s; a resumed sweep sees it" in driven.out.getvalue()
    assert driven.first in driven.folder.unfinished(driven.plan)
    assert driven.folder.rows() == {}


def test_a_trial_whose_processes_die_before_they_begin_has_failed(driven: Driven) -> None:
    driven.follow.on_trial_error(0, [], driven.trial())
    assert driven.told == [(driven.first, "failed")]
    assert f"died {MAX_BARREN + 1} times before it could begin" in driven.folder.row(driven.first)["error"]


def test_a_stopped_trial_without_a_row_is_pruned_and_one_that_has_ended_stays(driven: Driven) -> None:
    driven.follow.on_trial_complete(0, [], driven.trial(said='{"step": 3}'))
    assert driven.told == [(driven.first, "pruned")]
    driven.write("finished")
    driven.follow.on_trial_complete(0, [], driven.trial(said='{"step": 3}'))
    assert driven.folder.row(driven.first)["status"] == "finished"
    assert driven.follow.to_complete() == {}


def test_a_row_that_is_broken_is_said_and_stays_for_the_repair(driven: Driven) -> None:
    driven.path.parent.mkdir(parents=True)
    driven.path.write_text("{")
    driven.follow.on_trial_complete(0, [], driven.trial())
    assert driven.path.read_text() == "{"
    assert "cannot be read; a resumed sweep sees it, or runs the trial again" in driven.out.getvalue()


def test_a_row_is_replaced_only_where_that_is_wanted(driven: Driven) -> None:
    driven.path.parent.mkdir(parents=True)
    write_json(driven.path, {"status": "finished"})
    write_row(driven.folder, driven.first, {"status": "failed"}, replaces=False)
    assert driven.folder.row(driven.first)["status"] == "finished"
    write_row(driven.folder, driven.first, {"status": "failed"})
    assert driven.folder.row(driven.first)["status"] == "failed"
