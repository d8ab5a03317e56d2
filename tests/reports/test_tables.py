"""The Pareto front, the setting to use and the summary of a sweep."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from hamu.reports.summary import summarise
from hamu.reports.tables import (
    best_settings,
    front_text,
    pareto_front,
    recommended,
    setting_text,
    varying_settings,
    with_settings,
)


def trial(trial_id, forget_quality, retain_utility, **more):
    return {
        "trial_id": trial_id, "method": "hamu-q", "learning_rate": 0.01, "constraint_ratio": 0.5, "rho": 0.0,
        "seed": 42, "status": "finished", "stop_reason": "finished", "steps": 10, "forget_quality": forget_quality,
        "retain_utility": retain_utility, "original_retain_accuracy": 0.95,
        "retain_accuracy": 0.95 + (retain_utility or 0.0), **more,
    }  # fmt: skip


def ids(rows):
    return [row["trial_id"] for row in rows]


@pytest.mark.parametrize("seed", range(20))
def test_front_is_what_no_other_trial_dominates(seed):
    rng = np.random.default_rng(seed)
    # few distinct values, so that ties on one axis and on both are common
    rows = [trial(str(i), float(x), float(y)) for i, (x, y) in enumerate(rng.integers(0, 8, (40, 2)))]
    points = {(row["forget_quality"], row["retain_utility"]) for row in rows}
    expected = {
        p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)
    }  # brute force  # fmt: skip
    front = pareto_front(rows)
    assert {(row["forget_quality"], row["retain_utility"]) for row in front} == expected
    assert len(front) == len(expected)
    assert [row["forget_quality"] for row in front] == sorted(row["forget_quality"] for row in front)


def test_front_leaves_out_failed_pruned_and_non_finite_trials():
    rows = [
        trial("a", 1.0, 0.0),
        trial("b", math.inf, 0.0),
        trial("c", 2.0, math.nan),
        trial("d", None, None),
        trial("e", 9.0, 9.0, status="failed"),
        trial("f", 9.0, 9.0, status="pruned"),
        trial("g", 9.0, 9.0, status=None, error="out of memory"),
    ]
    assert ids(pareto_front(rows)) == ["a"]
    assert pareto_front([]) == []


def test_of_trials_at_one_point_the_first_is_on_the_front():
    assert ids(pareto_front([trial("a", 1.0, 0.0), trial("b", 1.0, 0.0), trial("c", 2.0, -1.0)])) == ["a", "c"]


def test_recommended_forgets_most_within_a_point_of_retain_accuracy():
    rows = [trial("a", 0.5, 0.01), trial("b", 2.0, -0.01), trial("c", 50.0, -0.011), trial("ga", 400.0, -30.0)]
    assert recommended(rows)["trial_id"] == "b"  # a loss of exactly one point is still kept


def test_forgetting_beyond_twice_the_loss_of_a_guess_is_not_preferred():
    rows = [trial("a", 4.7, 0.3, n_classes=10), trial("b", 30.0, -0.009, n_classes=10), trial("c", 3.0, 0.4, n_classes=10)]
    assert recommended(rows)["trial_id"] == "a"  # 2 ln 10 = 4.6 nats: b forgets no more, and keeps less


@pytest.mark.parametrize(
    "row", [trial("a", 0.0, 0.0, steps=0), trial("a", -0.1, 0.1), trial("a", 3.0, 0.0, retain_accuracy=None)]
)
def test_nothing_is_recommended_without_a_step_forgetting_or_retain_accuracy(row):
    assert recommended([row]) is None


def test_best_settings_has_one_row_a_method_the_recommended_first():
    rows = [
        trial("a", 1.0, 0.0),
        trial("b", 3.0, 0.0, method="hamu-u"),
        trial("c", 9.0, -5.0, method="ga"),
        trial("d", 8.0, -0.2, method="ga"),
        trial("e", 0.0, 0.0, method="kl", steps=0),
    ]
    best = best_settings(rows)
    assert ids(best) == ["b", "a", "d"]
    assert [row["is_recommended"] for row in best] == [True, False, False]
    assert [row["keeps_retain_accuracy"] for row in best] == [True, True, False]


def test_label_names_only_settings_that_vary():
    rows = [
        trial("a", 1, 0),
        trial("b", 1, 0, constraint_ratio=0.1),
        trial("c", 1, 0, method="ga", constraint_ratio=None),
    ]
    assert varying_settings(rows) == ("method", "constraint_ratio")
    assert [setting_text(row, varying_settings(rows)) for row in rows] == [
        "hamu-q, ratio 0.5",
        "hamu-q, ratio 0.1",
        "ga",
    ]


def test_front_text_marks_the_setting_to_use():
    lines = front_text([trial("a", 1.0, 0.0), trial("b", 30.0, -3.0, method="ga")]).splitlines()
    assert [line[0] for line in lines[1:]] == [" ", "*"]
    assert lines[2].endswith("a")
    assert front_text([]) == "no trial has finite results yet"


def test_summary_counts_and_times_the_trials():
    rows = [
        trial("a", 1.0, 0.0, started_at=10.0, ended_at=15.0, train_s=4.0, gradient_product=0.9,
              max_constraint_ratio=0.8),
        trial("b", 0.0, 0.0, started_at=11.0, ended_at=12.0, train_s=1.0, gradient_product=1.1,
              max_constraint_ratio=0.8, stop_reason="infeasible", steps=0),
        trial("c", 3.0, -1.0, started_at=12.0, ended_at=21.0, train_s=7.0, stop_reason="stopping_criterion",
              gradient_product=math.nan, forget_accuracy=math.nan),
        trial("d", None, None, status="failed", error="x", stop_reason=None),
        trial("e", 5.0, 5.0, status="pruned", stop_reason=None),
    ]  # fmt: skip
    summary = summarise(rows, name="n", space="digits/quickstart", task="digits", slots=2, hardware="2 cores")
    assert summary["trials"] == {"total": 5, "finished": 3, "failed": 1, "early_stopped": 2, "pruned": 1}
    assert (summary["wall_s"], summary["train_s"]) == (11.0, 12.0)
    assert (summary["infeasible"], summary["infeasible_at_start"]) == (1, 1)
    assert (summary["gradient_product"], summary["gradient_product_range"]) == (1.0, [0.9, 1.1])
    assert (summary["max_constraint_ratio"], summary["view"]) == (0.8, "paper")
    assert ids(summary["pareto"]) == ["a", "c"]
    assert summary["pareto"][1]["forget_accuracy"] is None
    assert summary["recommended"]["trial_id"] == "a"
    json.dumps(summary, allow_nan=False)


def test_summary_of_no_trials_is_all_zero_and_null():
    summary = summarise([], name="n", space="s", task="t", slots=None)
    assert summary["trials"]["total"] == summary["train_s"] == 0
    assert summary["wall_s"] is summary["recommended"] is summary["gradient_product"] is None
    json.dumps(summary, allow_nan=False)


def test_settings_of_forget_sets_and_of_relative_ratios_are_told_in_words() -> None:
    rows = [
        {"method": "hamu-q", "constraint_ratio": 0.3, "relative_constraint": True, "forget_set": f"forget_{number}", "rho": None}
        for number in (1, 2)
    ]
    assert varying_settings(rows) == ("forget_set",)
    assert setting_text(rows[0], ("constraint_ratio", "forget_set")) == "hamu-q, ratio 0.3 of S, forget_1"
    by_rho = [{"method": "ft", "forget_set": f"forget_0_{rho}", "rho": rho} for rho in (0.0, 0.5)]
    assert [setting_text(row, varying_settings(by_rho)) for row in by_rho] == ["ft, rho 0", "ft, rho 0.5"]


def test_settings_without_a_column_are_read_from_the_configuration_and_told() -> None:
    rows = [{**trial("a", 1.0, 0.0), "config": '{"use_optimizer": true, "learning_rate": 0.01}'}]
    assert with_settings(rows, ("method", "use_optimizer"))[0]["use_optimizer"] is True
    assert "use_optimizer True" in front_text(rows, names=("method", "constraint_ratio", "use_optimizer")).splitlines()[1]
