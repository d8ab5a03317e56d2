"""The axes of a sweep's views, the hypervolume in them, and the closeness to a retrained model."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest

from hamu.errors import ConfigError
from hamu.reports.closeness import NEGLIGIBLE_GAP, forget_closeness, with_references
from hamu.reports.hypervolume import hypervolume
from hamu.reports.views import View, not_compared, view_of

PAPER, REFERENCE = View("paper"), View("reference")
LN10 = math.log(10)


def row(forgetting, utility, **more):
    return {"status": "finished", "n_classes": 10, "forget_quality": forgetting, "retain_utility": utility, **more}


def compared(loss=3.0, accuracy=0.0, auc=0.9, **more):
    """A trial of a model that knew the forget rows (loss 0.1, accuracy 1), whose retrained model does not."""
    return {
        "original_forget_loss": 0.1, "original_forget_accuracy": 1.0, "original_forget_test_loss_auc": 0.5,
        "retrained_forget_loss": 3.0, "retrained_forget_accuracy": 0.0, "retrained_forget_test_loss_auc": 0.9,
        "forget_loss": loss, "forget_accuracy": accuracy, "forget_test_loss_auc": auc, **more,
    }  # fmt: skip


def test_closeness_is_one_at_the_retrained_model_and_zero_at_the_original():
    assert forget_closeness(compared()) == pytest.approx(1.0)
    assert forget_closeness(compared(loss=0.1, accuracy=1.0, auc=0.5)) == pytest.approx(0.0)


def test_closeness_is_the_mean_of_the_parts():
    # loss half way; accuracy a quarter of the way; AUC all the way
    assert forget_closeness(compared(loss=1.55, accuracy=0.75)) == pytest.approx((0.5 + 0.25 + 1.0) / 3)


def test_over_shoot_counts_as_distance():
    assert forget_closeness(compared(loss=5.9)) == pytest.approx(2 / 3)  # as far past the retrained model as the original before
    assert forget_closeness(compared(loss=400.0)) < -40


def test_a_trial_on_its_way_is_between_the_two_models_on_both_sides_of_an_auc_of_a_half():
    """As where a whole class is forgotten: the original tells its rows by a low loss, the retrained model by a high one."""
    ends = {"original_forget_test_loss_auc": 0.75, "retrained_forget_test_loss_auc": 0.05}
    way = [forget_closeness(compared(auc=auc, **ends)) for auc in (0.75, 0.6, 0.5, 0.3, 0.05)]
    assert way == sorted(way)
    assert way[-1] == pytest.approx(1.0)


def test_a_part_without_a_gap_is_left_out():
    gone = {"original_forget_test_loss_auc": 0.9 + 0.9 * NEGLIGIBLE_GAP}
    assert forget_closeness(compared(auc=0.7, **gone)) == pytest.approx(1.0)
    assert forget_closeness(compared(auc=0.7, original_forget_test_loss_auc=None)) == pytest.approx(1.0)


def test_no_closeness_without_a_part_or_without_the_trials_own_value():
    assert forget_closeness(compared(loss=math.nan)) is None
    assert forget_closeness(compared(accuracy=None)) is None
    assert forget_closeness({"forget_loss": 1.0, "original_forget_loss": 0.5}) is None


def test_references_are_joined_by_key_and_leave_other_rows_as_they_are():
    result = {"forget_loss": 3.0, "forget_accuracy": 0.0, "forget_test_loss_auc": 0.9, "test_loss": None, "wall_s": 2.0}
    rows = [
        compared(loss=1.55, reference="a") | {"retrained_forget_loss": None},
        {"trial_id": "b", "reference": "broken"},
        {"trial_id": "c", "reference": None},
        {"trial_id": "d", "forget_closeness": 0.5, "reference": "later"},
    ]
    joined = with_references(rows, {"a": {"path": "p", "result": result}, "broken": {"error": "x"}})
    assert joined[0]["forget_closeness"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert joined[0]["retrained_forget_loss"] == 3.0
    assert not {"retrained_test_loss", "retrained_wall_s"} & joined[0].keys()
    assert joined[1:] == rows[1:]
    assert rows[0]["retrained_forget_loss"] is None


def test_the_retrained_models_quality_and_utility_are_from_the_original_as_a_trials_are():
    result = {"forget_loss": 3.0, "retain_loss": 0.5, "forget_quality": 99.0, "retain_utility": 99.0}
    row = {"reference": "a", "original_forget_loss": 0.5, "original_retain_loss": 0.25}
    (joined,) = with_references([row], {"a": {"result": result}})
    assert (joined["retrained_forget_quality"], joined["retrained_retain_utility"]) == (2.5, -0.25)
    (joined,) = with_references([{"reference": "a"}], {"a": {"result": result}})
    assert "retrained_forget_quality" not in joined


def test_the_view_is_the_reference_view_where_every_trial_that_can_be_was_compared():
    compared_one, alone = row(1, 0, forget_closeness=-3.0), row(1, 0, trial_id="alone")
    assert view_of([]) == view_of([alone]) == view_of([row(1, 0, forget_closeness=math.nan)]) == PAPER
    assert view_of([compared_one]) == REFERENCE
    assert view_of([alone, compared_one]) == PAPER
    assert not_compared([alone, compared_one]) == ["alone"]
    assert not_compared([alone]) == not_compared([compared_one]) == []
    with pytest.raises(ConfigError, match="did you mean 'paper'"):
        View("papers")


@pytest.mark.parametrize("bad", [{"status": "failed"}, {"status": "pruned"}, {"status": "dropped"}, {"retain_utility": math.nan}])
def test_a_trial_without_a_place_does_not_decide_the_view(bad):
    rows = [row(1, 0, forget_closeness=0.5), {**row(1, 0), **bad}]
    assert view_of(rows) == REFERENCE
    assert not_compared(rows) == []


def test_trials_to_come_decide_the_view_as_those_that_ended():
    compared_one = row(1, 0, forget_closeness=0.5)
    assert view_of([], to_come=[True, True]) == view_of([compared_one], to_come=[True]) == REFERENCE
    assert view_of([], to_come=[True, False]) == view_of([compared_one], to_come=[False]) == PAPER
    assert view_of([row(1, 0)], to_come=[True]) == PAPER


def test_forgetting_counts_to_twice_the_loss_of_a_guess_in_the_paper_view():
    assert PAPER.point(row(50.0, -1.0)) == (pytest.approx(2 * LN10), -1.0)
    assert PAPER.point(row(50.0, -1.0, n_classes=None)) == (50.0, -1.0)
    assert REFERENCE.point(row(50.0, -1.0, forget_closeness=0.25)) == (0.25, -1.0)


@pytest.mark.parametrize("bad", [{"status": "failed"}, {"status": "pruned"}, {"status": "dropped"}, {"retain_utility": math.nan}])
def test_a_trial_that_did_not_finish_or_diverged_has_no_place(bad):
    assert PAPER.point({**row(1.0, 0.0), **bad}) is None
    assert REFERENCE.point(row(1.0, 0.0)) is None


def staircase(points, corner):
    """The dominated area, cell by cell of the grid that the coordinates span."""
    xs = sorted({corner[0], *(x for x, _ in points if x > corner[0])})
    ys = sorted({corner[1], *(y for _, y in points if y > corner[1])})
    return sum(
        (x1 - x0) * (y1 - y0)
        for (x0, x1), (y0, y1) in itertools.product(itertools.pairwise(xs), itertools.pairwise(ys))
        if any(x >= x1 and y >= y1 for x, y in points)
    )


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_is_the_area_that_the_trials_dominate(seed):
    rng = np.random.default_rng(seed)
    points = [(float(x), float(y)) for x, y in zip(rng.uniform(-1, 8, 30), rng.uniform(-5, 0.5, 30), strict=True)]
    rows = [row(x, y) for x, y in points]
    capped = [(min(x, 2 * LN10), y) for x, y in points]
    assert hypervolume(rows, PAPER) == pytest.approx(staircase(capped, (0.0, -LN10)))
    close = [row(0, y, forget_closeness=x) for x, y in points]
    assert hypervolume(close, REFERENCE) == pytest.approx(staircase(points, (0.0, -LN10)))


def test_hypervolume_of_one_trial_is_its_rectangle_and_more_trials_never_shrink_it():
    assert hypervolume([row(2.0, 0.0)], PAPER) == pytest.approx(2.0 * LN10)
    assert hypervolume([row(2.0, 0.0), row(1.0, -1.0), row(-5.0, 3.0)], PAPER) == pytest.approx(2.0 * LN10)
    assert hypervolume([row(2.0, 0.0), row(900.0, -LN10 - 1)], PAPER) == pytest.approx(2.0 * LN10)  # as gradient ascent


def test_hypervolume_is_unknown_without_the_classes_and_zero_without_a_place():
    assert hypervolume([row(2.0, 0.0, n_classes=None)], PAPER) is None
    assert hypervolume([], PAPER) is None
    assert hypervolume([row(2.0, 0.0, status="failed")], PAPER) == 0.0
    assert PAPER.reference_point([row(2.0, 0.0, n_classes=None), row(2.0, 0.0)]) == (0.0, pytest.approx(-LN10))


def test_reading_rows_loads_no_library_of_the_search():
    code = "import sys, hamu.reports.tables, tune_spaces.search; print([m for m in ('moocore', 'optuna', 'sklearn', 'torch') "
    code += "if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip() == "[]"
