"""Conditions on a trial's results, as `--target` and `--keep` give them."""

from __future__ import annotations

import math

import pytest

from hamu.errors import ConfigError
from tune_spaces.goals import Condition, goals_text, parse_condition, parse_conditions, total_violation

ROW = {
    "forget_accuracy": 0.1, "retrained_forget_accuracy": 0.05, "retain_accuracy": 0.93, "original_retain_accuracy": 0.95,
    "forget_loss": 2.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "metric", "at_most", "base", "shift"),
    [
        ("forget_accuracy<=retrained", "forget_accuracy", True, "retrained", 0.0),
        (" retain_accuracy >= original - 0.01 ", "retain_accuracy", False, "original", -0.01),
        ("forget_accuracy<=0.05", "forget_accuracy", True, None, 0.05),
        ("forget_test_loss_auc<=.5+1e-2", "forget_test_loss_auc", True, None, 0.51),
        ("retain_utility>=-0.5", "retain_utility", False, None, -0.5),
        ("forget_loss>=retrained+0.1", "forget_loss", False, "retrained", 0.1),
        ("forget_closeness>=0.9", "forget_closeness", False, None, 0.9),
    ],
)
def test_a_condition_is_a_metric_a_side_and_a_limit(text, metric, at_most, base, shift):
    read = parse_condition(text, "target")
    assert (read.metric, read.at_most, read.base, read.shift) == (metric, at_most, base, pytest.approx(shift))
    assert parse_condition(read.text, "target") == read


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("forget_acuracy<=0.1", "did you mean 'forget_accuracy'"),
        ("forget_accuracy<0.1", "a condition is metric<=limit"),
        ("forget_accuracy<=", "a condition is metric<=limit"),
        ("forget_accuracy<=originals", "a condition is metric<=limit"),
        ("", "a condition is metric<=limit"),
        ("retain_rouge>=original-0.1", "retain_rouge of the original model is not recorded"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_mend(text, words):
    with pytest.raises(ConfigError, match=words) as raised:
        parse_condition(text, "keep")
    assert str(raised.value).startswith(f"keep {text!r}")


def test_several_conditions_come_by_commas_and_by_repeated_flags():
    read = parse_conditions(("forget_accuracy<=0.1, retain_accuracy>=0.9", "forget_loss>=1"), "target")
    assert [condition.metric for condition in read] == ["forget_accuracy", "retain_accuracy", "forget_loss"]


def test_violation_is_the_distance_to_the_limit_and_zero_when_met():
    kept = parse_condition("retain_accuracy>=original-0.01", "keep")
    assert kept.violation(ROW) == pytest.approx(0.01)
    assert kept.gap({**ROW, "retain_accuracy": 0.99}) == pytest.approx(-0.05)
    assert kept.violation({**ROW, "retain_accuracy": 0.94}) == 0.0  # 0.95 - 0.01 is a little more than 0.94 in floats
    assert parse_condition("forget_accuracy<=retrained", "target").violation(ROW) == pytest.approx(0.05)


@pytest.mark.parametrize("gone", [{"forget_accuracy": None}, {"retrained_forget_accuracy": None}, {"forget_accuracy": math.nan}])
def test_a_metric_or_reference_that_is_missing_is_not_met_and_said(gone):
    target = parse_condition("forget_accuracy<=retrained", "target")
    row = {**ROW, **gone}
    assert target.violation(row) is None
    assert total_violation((target,), row) is None
    assert f"the trial has no {next(iter(gone))}" in goals_text((target,), row)


def test_goals_text_says_how_a_trial_stands_to_each():
    conditions = parse_conditions(("forget_accuracy<=retrained,retain_accuracy>=0.9",), "target")
    assert goals_text(conditions, ROW) == (
        "forget_accuracy<=retrained missed by 0.05 (0.1, limit 0.05); retain_accuracy>=0.9 met (0.93, limit 0.9)"
    )
    assert total_violation(conditions, ROW) == pytest.approx(0.05)


def test_forget_test_auc_of_the_original_can_be_a_limit():
    read = parse_condition("forget_test_loss_auc<=original", "target")
    assert read == Condition(metric="forget_test_loss_auc", at_most=True, base="original", shift=0.0)
