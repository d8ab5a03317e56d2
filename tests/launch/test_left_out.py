"""What is written and said of trials that cannot run, of a grid and of a search; and what the end of a sweep says of it all."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.attempts import Attempts, was_begun
from launch.follow import write_row
from launch.left_out import without_dropped, without_failed
from launch.machine import Machine, Slots
from launch.plan import Plan, make_plan
from launch.results import SweepFolder, write_json
from launch.shared import failed_row
from launch.summary import summary_text, write_summary
from launch.words import Words
from tune_spaces.search import SearchSettings
from tune_spaces.space import load_space

MACHINE = Machine(cpus=2, cpu_name="a core", memory_bytes=2**34, gpus=0)


class Started:
    """A sweep of two seeds with two trials each, of which none has run."""

    def __init__(self, root: Path, *, with_reference: bool = False, **search: Any) -> None:
        overrides = {"unlearning_method": ("ft",), "learning_rate": (0.01, 0.02), "seed": (1, 2)}
        self.plan: Plan = make_plan(
            load_space("digits/quickstart"), name="mine", overrides=overrides, root=root, search=SearchSettings(**search),
            with_reference=with_reference,
        )  # fmt: skip
        self.folder = SweepFolder(root / "mine")
        self.folder.path.mkdir()
        self.folder.start(self.plan)
        self.ids = [trial.trial_id for trial in self.plan.trials]
        first = self.plan.trials[0].original
        self.failed = {first: "no room"}
        self.lost = [trial.trial_id for trial in self.plan.trials if trial.original == first]
        self.rest = [trial_id for trial_id in self.ids if trial_id not in self.lost]
        self.said = io.StringIO()

    def without_failed(self, todo: list[str] | None = None) -> list[str]:
        return without_failed(self.plan, todo or self.ids, self.folder, self.failed, Words(Console(file=self.said)))

    def statuses(self) -> dict[str, str]:
        return {trial_id: row["status"] for trial_id, row in self.folder.rows().items()}

    def summary(self) -> tuple[dict[str, Any], str]:
        summary = write_summary(self.plan, self.folder, slots=Slots(count=1), machine=MACHINE)
        return summary, summary_text(summary, self.folder.write_trials(), self.folder.report)


def test_trials_of_a_grid_whose_original_failed_fail_and_took_no_time(tmp_path: Path) -> None:
    sweep = Started(tmp_path)
    assert sweep.without_failed() == sweep.rest
    assert sweep.statuses() == dict.fromkeys(sweep.lost, "failed")
    rows = sweep.folder.write_trials()
    assert [(row["error"], row["started_at"], row["ended_at"]) for row in rows] == [("no room", None, None)] * 2
    summary, text = sweep.summary()
    assert (summary["cost"]["n_trials"], summary["wall_s"], summary["trials"]["failed"]) == (0, None, 2)
    assert "cost: no trial ran" in text


def test_a_search_leaves_trials_whose_original_failed_out_and_says_how_many(tmp_path: Path) -> None:
    sweep = Started(tmp_path, name="random", trials=2)
    assert sweep.without_failed() == sweep.rest
    assert sweep.statuses() == {}
    assert sweep.said.getvalue() == "2 trials cannot start, as their original failed; the search chooses among the other 2\n"


def test_a_trial_that_a_search_had_chosen_fails_with_its_original(tmp_path: Path) -> None:
    sweep = Started(tmp_path, name="random", trials=2)
    Attempts(sweep.folder.trial(sweep.lost[1]), "first").open()
    sweep.without_failed()
    assert sweep.statuses() == {sweep.lost[1]: "failed"}
    assert "1 trial cannot start, as its original failed" in sweep.said.getvalue()  # the other one


def test_where_a_search_can_run_nothing_its_trials_fail_and_a_later_run_takes_that_back(tmp_path: Path) -> None:
    sweep = Started(tmp_path, name="random", trials=2)
    assert sweep.without_failed(sweep.lost) == []
    assert sweep.statuses() == dict.fromkeys(sweep.lost, "failed")
    assert not any(was_begun(sweep.folder.trial(trial_id)) for trial_id in sweep.lost)
    sweep.failed = {}
    assert sweep.without_failed() == sweep.ids
    assert sweep.statuses() == {}


def test_a_trial_that_was_dropped_took_no_time(tmp_path: Path) -> None:
    sweep = Started(tmp_path)
    without_dropped(sweep.plan, sweep.ids, sweep.folder, {sweep.ids[0]: "asks for 2 S"}, Words(Console(file=sweep.said)))
    [row] = sweep.folder.rows().values()
    assert (row["status"], row["started_at"], row["ended_at"]) == ("dropped", None, None)


def test_a_summary_names_the_retain_only_models_that_failed_and_how_to_make_them(tmp_path: Path) -> None:
    sweep = Started(tmp_path, with_reference=True)
    there, lost = sweep.plan.references
    write_json(sweep.folder.references_path, {there: {"path": "x", "result": {"forget_loss": 1.0}}, lost: {"error": "no room"}})
    summary, text = sweep.summary()
    assert summary["references_failed"] == {lost: "no room"}
    assert json.loads(sweep.folder.summary.read_text())["references_failed"] == {lost: "no room"}
    assert f"failed: the retain-only model {lost}: no room" in text
    assert f"make it with: python launch/sweep.py --resume mine --storage-path {tmp_path}" in text
    write_json(sweep.folder.references_path, {there: {"path": "x", "result": {"forget_loss": 1.0}}})
    summary, text = sweep.summary()
    assert summary["references_failed"] == {}
    assert "retain-only" not in text


def test_the_summary_of_a_resumed_sweep_counts_no_pause(tmp_path: Path) -> None:
    sweep = Started(tmp_path)
    runs = [{"started_at": at, "ended_at": at + 50.0} for at in (1000.0, 90_000.0)]
    for trial, run in zip(sweep.plan.trials, runs, strict=False):
        row = {**failed_row(sweep.plan, trial, "x"), "status": "finished", **run}
        write_row(sweep.folder, trial.trial_id, row)
    write_json(sweep.folder.runs_path, runs)
    summary, text = sweep.summary()
    assert summary["wall_s"] == summary["cost"]["wall_s"] == 100.0
    assert summary["cost"]["trials_per_hour"] == pytest.approx(72.0)
    assert "2 trials in 100.0 s, 72 an hour" in text


def test_a_summary_tells_a_search_that_went_by_another_view_than_the_report(tmp_path: Path) -> None:
    sweep = Started(tmp_path, name="random", trials=2)
    write_json(sweep.folder.search_path, {"ended": None, "proposed": 2, "view": "reference", "left_out": 2})
    summary, text = sweep.summary()
    assert (summary["search"]["view"], summary["view"]) == ("reference", "paper")
    assert "the search went by the reference view" in text
    assert "2 trials were left out, as their original failed" in text
