"""What a sweep cost is said by its trials' own times, and what early ends saved by their own pace."""

from __future__ import annotations

from typing import Any

import pytest

from hamu.models.record import json_text
from hamu.reports.cost import cost_of, cost_text, wall_seconds


def row(start: float | None = 0.0, end: float | None = 10.0, **columns: Any) -> dict[str, Any]:
    """A trial of 100 steps in 5 s of steps, whole."""
    return {
        "status": "finished", "method": "hamu-q", "stop_reason": "finished", "started_at": start, "ended_at": end,
        "steps": 100, "total_steps": 100, "steps_s": 5.0, **columns,
    }  # fmt: skip


def test_trials_an_hour_go_by_the_clock_and_core_hours_by_the_slots_that_were_busy() -> None:
    rows = [row(0, 1800), row(0, 900), row(900, 1800), {"status": "dropped"}]
    cost = cost_of(rows, n_slots=2, cpus_per_trial=4)
    assert (cost["n_trials"], cost["n_dropped"], cost["wall_s"]) == (3, 1, 1800)
    assert cost["trials_per_hour"] == pytest.approx(6)
    assert (cost["unit"], cost["unit_hours"]) == ("core", pytest.approx(4.0))  # 3600 s of slots, 4 cores each
    assert cost_text(cost) == "cost: 3 trials in 30.0 min, 6 an hour (2 at once), 4 core-hours"


def test_a_share_of_a_gpu_is_that_share_of_a_gpu_hour() -> None:
    cost = cost_of([row(0, 3600)], n_slots=1, cpus_per_trial=8, gpus_per_trial=0.25)
    assert (cost["unit"], cost["unit_hours"]) == ("GPU", 0.25)
    assert "0.25 GPU-hours" in cost_text(cost)


def test_the_time_that_a_sweep_says_it_took_wins_over_the_span_of_its_trials() -> None:
    resumed = [row(0, 100), row(100_000, 100_100)]
    assert cost_of(resumed, n_slots=1)["wall_s"] == 100_100
    cost = cost_of(resumed, n_slots=1, wall_s=200.0)
    assert cost["trials_per_hour"] == pytest.approx(36)


def test_the_wall_time_of_a_resumed_sweep_leaves_the_pause_out() -> None:
    rows = [row(0, 100), row(50, 130), row(100_000, 100_100), row(None, None, status="failed")]
    assert wall_seconds(rows) == 100_100
    runs = [{"started_at": 0.0, "ended_at": 140.0}, {"started_at": 99_999.0, "ended_at": 100_100.0}]
    assert wall_seconds(rows, runs) == 140 + 101
    assert wall_seconds(rows, runs[1:]) == 130 + 101  # the first run was of a version that kept no runs
    shares = [{"started_at": start, "ended_at": start + 50.0} for start in (0.0, 20.0, 100.0)]
    assert wall_seconds([], shares) == 70 + 50  # shares of a sweep that ran at the same time
    assert wall_seconds([], runs[:1]) == 140  # killed before a trial ended
    assert wall_seconds([]) is None


def test_trials_that_never_ran_for_want_of_an_original_cost_nothing() -> None:
    cost = cost_of([row(0, 3600), row(None, None, status="failed", train_s=0.0)], n_slots=1)
    assert (cost["n_trials"], cost["trials_per_hour"], cost["unit_hours"]) == (1, 1.0, 1.0)


@pytest.mark.parametrize("reason", ["stopping_criterion", "infeasible", "target_reached", "pruned"])
def test_what_an_early_end_saved_is_the_steps_it_left_at_its_own_pace(reason: str) -> None:
    early = row(steps=20, steps_s=4.0, stop_reason=reason)  # 0.2 s a step, four times as slow as the other
    cost = cost_of([row(), early], n_slots=1)
    assert (cost["n_early"], cost["steps_saved"], cost["early_by"]) == (1, 80, {reason: 1})
    assert cost["saved_s"] == pytest.approx(16.0)
    assert cost["saved_share"] == pytest.approx(16 / (5 + 4 + 16))


def test_a_trial_that_took_no_step_is_set_at_the_median_pace_of_its_method() -> None:
    none = row(steps=0, steps_s=0.3, stop_reason="infeasible")
    rows = [row(steps_s=1.0), row(steps_s=2.0), row(steps_s=50.0), row(method="ft", steps_s=1000.0), none]
    assert cost_of(rows, n_slots=1)["saved_s"] == pytest.approx(2.0)
    alone = cost_of([none, row(method="ft")], n_slots=1)
    assert (alone["saved_s"], alone["n_unknown"], alone["n_early"]) == (0.0, 1, 1)
    assert "of 1 the pace is not known" in cost_text(alone)


@pytest.mark.parametrize("reason", ["finished", "non_finite", "failed", "cancelled", None])
def test_other_ends_saved_nothing(reason: str | None) -> None:
    cost = cost_of([row(), row(steps=20, stop_reason=reason, status="failed" if reason == "failed" else "finished")], n_slots=1)
    assert (cost["n_early"], cost["saved_s"]) == (0, 0)
    assert len(cost_text(cost).splitlines()) == 1


def test_early_ends_are_named_by_what_ended_them() -> None:
    rows = [row(), *(row(steps=50, steps_s=2.5, stop_reason=reason) for reason in ("infeasible", "pruned", "pruned"))]
    saved = cost_text(cost_of(rows, n_slots=1)).splitlines()[1]
    assert saved == (
        "early stopping saved 7.5 s of training (38% of all steps' time): 1 by an infeasible constraint, 2 by the scheduler"
    )


def test_rows_of_before_and_sweeps_without_a_trial_are_no_error() -> None:
    nothing = cost_of([], n_slots=2)
    assert (nothing["trials_per_hour"], nothing["saved_share"]) == (None, None)
    assert cost_text(nothing) == "cost: no trial ran"
    failed_at_the_start = {"status": "failed", "started_at": None}
    assert cost_of([failed_at_the_start], n_slots=2)["n_trials"] == 0
    old = row(steps=20, stop_reason="stopping_criterion")
    del old["total_steps"], old["steps_s"]
    cost = cost_of([old], n_slots=1)
    assert (cost["n_early"], cost["n_trials"]) == (0, 1)
    assert json_text(cost)
