"""Reports of sweeps with retrained models, and of sweeps that measured times alone."""

from __future__ import annotations

import json
import math

import pytest

from hamu.reports.figures import pareto_png
from hamu.reports.page import render_page, write_results
from hamu.reports.summary import not_compared_text, summarise
from hamu.reports.tables import best_settings, front_text, pareto_front, recommended
from hamu.reports.timing import is_timing, timing_rows
from hamu.reports.views import View
from hamu.training.records import write_trials

PNG = b"\x89PNG\r\n\x1a\n"


def trial(trial_id, closeness, utility, quality, **more):
    return {
        "trial_id": trial_id, "method": "hamu-q", "learning_rate": 0.01, "constraint_ratio": 0.5, "status": "finished",
        "stop_reason": "finished", "steps": 10, "train_s": 2.0, "n_classes": 10, "forget_closeness": closeness,
        "retain_utility": utility, "forget_quality": quality, "retain_loss": 0.1, "original_retain_accuracy": 0.95,
        "retain_accuracy": 0.95 + utility, **more,
    }  # fmt: skip


ROWS = [
    trial("near", 0.95, -0.004, 2.9),
    trial("over", -4.0, -0.002, 12.0, method="ga"),
    trial("little", 0.4, 0.001, 1.1),
    trial("harmful", 0.99, -0.5, 3.0),
    trial("diverged", None, 0.3, None),
]


def summary_of(rows, **more):
    return summarise(rows, name="n", space="digits/demo", task="digits", slots=2, **more)


def test_over_forgetting_wins_the_paper_view_and_not_the_reference_view():
    assert recommended(ROWS, View("paper"))["trial_id"] == "over"
    assert recommended(ROWS)["trial_id"] == "near"


def test_front_is_in_the_reference_view_where_trials_were_compared():
    assert [row["trial_id"] for row in pareto_front(ROWS)] == ["little", "near", "harmful"]
    assert [row["trial_id"] for row in best_settings(ROWS)] == ["near", "over"]


def test_front_text_shows_the_closeness_in_the_reference_view_alone():
    head, *lines = front_text(ROWS).splitlines()
    assert "closeness" in head
    assert [line.split()[-1] for line in lines] == ["harmful", "near", "little"]
    assert "+0.95" in lines[1]
    assert lines[1].startswith("*")
    assert "closeness" not in front_text([{**row, "forget_closeness": None} for row in ROWS])


def test_summary_says_its_view_its_hypervolume_and_what_never_ran():
    dropped = [{"trial_id": "d", "status": "dropped", "steps": 0}, {"trial_id": "e", "status": "pruned", "steps": 0}]
    summary = summary_of([*ROWS, *dropped])
    assert (summary["view"], summary["dropped"], summary["pruned_at_start"]) == ("reference", 1, 1)
    assert summary["trials"]["total"] == 6
    assert summary["hypervolume_reference"] == [0.0, pytest.approx(-math.log(10))]
    height = math.log(10)
    steps = 0.4 * (height + 0.001) + 0.55 * (height - 0.004) + 0.04 * (height - 0.5)
    assert summary["hypervolume"] == pytest.approx(steps)
    assert summary["pareto"][1]["forget_closeness"] == 0.95
    json.dumps(summary, allow_nan=False)


def test_trials_that_could_not_be_compared_are_named_and_the_paper_view_is_shown():
    rows = [*ROWS, *(trial(f"alone{i}", None, 0.3, 4.0) for i in range(7))]
    summary = summary_of(rows)
    assert summary["view"] == "paper"
    assert summary["not_compared"] == [f"alone{i}" for i in range(7)]
    words = (
        "7 trials could not be compared with a retrained model, so the paper view is shown: alone0, alone1, alone2, alone3, "
        "alone4 and 2 more"
    )
    assert not_compared_text(summary) == words
    page = render_page(rows, summary, PNG)
    assert f"<li>{words}.</li>" in page
    assert "no retrained model to compare all trials with" in page
    assert not_compared_text(summary_of(ROWS)) == not_compared_text(summary_of(rows[5:])) == ""


def test_retain_only_models_that_failed_are_told_on_the_page(tmp_path):
    write_trials(tmp_path / "trials.parquet", ROWS)
    (tmp_path / "summary.json").write_text(json.dumps({"references_failed": {"abcd": "no <memory>"}}))
    assert write_results(tmp_path)["references_failed"] == {"abcd": "no <memory>"}
    assert "abcd: no &lt;memory&gt;" in (tmp_path / "report.html").read_text()


def test_page_says_which_view_and_what_it_cost(tmp_path):
    cost = {
        "n_trials": 5, "n_dropped": 0, "n_slots": 2, "wall_s": 10.0, "busy_s": 18.0, "trials_per_hour": 1800.0, "unit": "core",
        "unit_hours": 0.005, "n_early": 0, "early_by": {}, "steps_saved": 0, "saved_s": 0.0, "saved_share": None, "n_unknown": 0,
    }  # fmt: skip
    page = render_page(ROWS, summary_of(ROWS, cost=cost) | {"search": {"ended": "target x met by near"}}, PNG)
    for words in (
        "reference view",
        "target x met by near",
        "closeness",
        "1800 an hour",
        "hypervolume of the Pareto front",
        "from (0, -2.303)",
    ):
        assert words in page
    assert "this report has no retrained model" not in page


def test_page_of_a_folder_is_in_the_view_of_its_trials(tmp_path):
    write_trials(tmp_path / "trials.parquet", ROWS)
    (tmp_path / "summary.json").write_text(json.dumps({"search": {"ended": "enough"}, "slots": 3}))
    summary = write_results(tmp_path)
    assert (summary["view"], summary["slots"], summary["search"]) == ("reference", 3, {"ended": "enough"})
    assert "(reference view)" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "pareto.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("rows", [ROWS, ROWS[1:2], [{**row, "forget_closeness": -1e6} for row in ROWS]])
def test_figure_of_the_reference_view_can_be_drawn_with_far_trials(tmp_path, rows):
    pareto_png(rows, tmp_path / "pareto.png", dpi=50)
    assert (tmp_path / "pareto.png").read_bytes().startswith(PNG)


def timed(trial_id, method, steps_s, peaks, **more):
    return {"trial_id": trial_id, "method": method, "status": "finished", "steps": 10, "steps_s": steps_s,
            "train_s": steps_s + 1.0, "peak_bytes_per_rank": peaks, "retain_loss": None, **more}  # fmt: skip


TIMES = [
    timed("a", "hamu-q", 2.0, [2**30, 2**29]),
    timed("b", "hamu-q", 4.0, [2**29, 2**30]),
    timed("c", "ft", 1.0, [2**28]),
    timed("d", "kl", 9.0, None, status="failed"),
]


def test_times_alone_are_a_table_by_method_the_fastest_first():
    assert is_timing(TIMES)
    assert not is_timing(ROWS)
    assert not is_timing([])
    assert not is_timing(TIMES[3:])
    fast, slow = timing_rows(TIMES)
    assert (fast["method"], fast["step_ms"], fast["peak_mib_per_rank"]) == ("ft", 100.0, [256.0])
    assert (slow["method"], slow["trials"], slow["step_ms"], slow["steps_s"], slow["train_s"]) == ("hamu-q", 2, 300.0, 3.0, 4.0)
    assert slow["peak_mib_per_rank"] == [1024.0, 1024.0]


def test_a_timing_sweep_reports_times_instead_of_an_empty_front(tmp_path):
    lines = front_text(TIMES).splitlines()
    assert [line.split()[0] for line in lines] == ["method", "ft", "hamu-q"]
    assert lines[2].endswith("1024, 1024")
    summary = summary_of(TIMES)
    assert [row["method"] for row in summary["timing"]] == ["ft", "hamu-q"]
    assert summary_of(ROWS)["timing"] is None
    page = render_page(TIMES, summary, PNG)
    for words in ("Time and memory by method", "Fastest: <b>ft</b>, 100 ms a step", "1024, 1024"):
        assert words in page
    assert "<h2>Pareto front" not in page
    pareto_png(TIMES, tmp_path / "times.png", dpi=50)
    assert (tmp_path / "times.png").read_bytes().startswith(PNG)
