"""Tune is given each trial of a search once, those that were begun first, and no more than the budget; a resumed one goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from hamu.reports.views import View, view_of
from launch.follow import write_row
from launch.plan import Plan, make_plan
from launch.proposals import Proposals, open_search, view_for, write_search
from launch.results import SweepFolder, write_json
from launch.shared import failed_row
from launch.standing import is_searched
from tune_spaces.search import SearchSettings
from tune_spaces.space import Space

RATES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06)
SPACE = Space(
    name="digits/rates",
    summary="one trial a learning rate",
    base={"dataset_name": "digits", "unlearning_method": "ft"},
    grids=({"learning_rate": RATES},),
)


class Counting:
    """A search that proposes a, b, c ... and remembers what it was told."""

    def __init__(self, ids: str) -> None:
        self.left, self.told, self.ended = list(ids), [], None

    def propose(self) -> str | None:
        return self.left.pop(0) if self.left and self.ended is None else None

    def tell(self, trial_id: str, row: Mapping[str, Any]) -> None:
        self.told.append((trial_id, row))


def ids_of(proposals: Proposals, n: int) -> list[str]:
    """What Tune gets when it asks n times, all of them running."""
    given = [proposals.suggest(f"tune{i}") for i in range(n)]
    return [each["trial_id"] for each in given if isinstance(each, dict)]


def started(root: Path, **settings: Any) -> tuple[Plan, SweepFolder]:
    plan = make_plan(SPACE, name="mine", overrides={}, root=root, search=SearchSettings(**settings))
    folder = SweepFolder(root / "mine")
    folder.path.mkdir(exist_ok=True)
    folder.start(plan)
    return plan, folder


def end(plan: Plan, folder: SweepFolder, index: int, *, at: float = 1.0, status: str = "finished", **metrics: float) -> str:
    trial = plan.trials[index]
    row = {**failed_row(plan, trial, "x"), "status": status, "ended_at": at, "n_classes": 10, **metrics}
    write_row(folder, trial.trial_id, row)
    return trial.trial_id


def test_trials_that_were_begun_come_first_and_none_comes_twice() -> None:
    proposals = Proposals("ca", Counting("abcd"), budget=10)
    assert ids_of(proposals, 9) == ["c", "a", "b", "d"]


def test_no_more_than_the_budget_is_proposed() -> None:
    proposals = Proposals("a", Counting("bcdef"), budget=3)
    assert ids_of(proposals, 9) == ["a", "b", "c"]
    assert proposals.n_given == 3


def test_tune_is_told_that_it_is_over_only_when_nothing_runs() -> None:
    proposals = Proposals("a", Counting(""), budget=5)
    assert proposals.suggest("tune0") == {"trial_id": "a"}
    assert proposals.suggest("tune1") is None
    proposals.on_trial_complete("tune0")
    assert proposals.suggest("tune2") == Searcher.FINISHED


def test_an_ended_search_proposes_no_more_while_trials_run() -> None:
    search = Counting("abcd")
    proposals = Proposals([], search, budget=4)
    assert ids_of(proposals, 2) == ["a", "b"]
    proposals.tell("a", {"status": "finished"})
    search.ended = "target met"
    assert proposals.suggest("tune9") is None
    assert (search.told, proposals.ended) == ([("a", {"status": "finished"})], "target met")


@pytest.mark.parametrize(
    ("settings", "searched"),
    [
        ({}, False),
        ({"scheduler": "asha"}, False),
        ({"trials": 2}, True),
        ({"name": "random"}, True),
        ({"until": "no-gain:3"}, True),
    ],
)
def test_a_plain_grid_is_no_search(settings: dict[str, Any], searched: bool) -> None:
    assert is_searched(SearchSettings(**settings)) is searched


def test_a_resumed_search_counts_what_has_ended_and_leaves_it_out(tmp_path: Path) -> None:
    plan, folder = started(tmp_path, name="random", trials=4)
    every = [trial.trial_id for trial in plan.trials]
    ended = {end(plan, folder, 1), end(plan, folder, 3, status="dropped")}
    out = {every[5]}
    search = open_search(plan, folder, out)
    found = [search.propose() for _ in range(5)]
    proposed = {each for each in found if each is not None}
    assert len(proposed) == 3  # of four trials one had ended; the dropped one was never tried
    assert proposed == set(every) - ended - out


def test_a_resumed_search_is_told_the_rows_in_the_order_in_which_they_ended(tmp_path: Path) -> None:
    plan, folder = started(tmp_path, until="no-gain:2")
    end(plan, folder, 0, at=30.0, forget_quality=1.0, retain_utility=-1.0)
    end(plan, folder, 1, at=20.0, forget_quality=1.0, retain_utility=-1.0)
    end(plan, folder, 2, at=10.0, forget_quality=2.0, retain_utility=-0.1)
    assert open_search(plan, folder).ended is not None  # the best was the first, and two after it gained nothing
    end(plan, folder, 2, at=40.0, forget_quality=2.0, retain_utility=-0.1)
    assert open_search(plan, folder).ended is None


def test_a_search_goes_by_retain_only_models_where_all_of_them_are_there(tmp_path: Path) -> None:
    plan = make_plan(SPACE, name="mine", overrides={}, root=tmp_path, with_reference=True)
    folder = SweepFolder(tmp_path / "mine")
    folder.path.mkdir()
    folder.start(plan)
    [key] = plan.references
    assert view_for(plan, folder).name == "paper"
    write_json(folder.references_path, {key: {"error": "no memory"}})
    assert view_for(plan, folder).name == "paper"
    write_json(folder.references_path, {key: {"path": "there", "result": {"forget_loss": 1.0}}})
    assert view_for(plan, folder).name == "reference"


def test_a_search_goes_by_the_view_of_the_report_of_its_trials(tmp_path: Path) -> None:
    plan = make_plan(SPACE, name="mine", overrides={"seed": (1, 2)}, root=tmp_path, with_reference=True)
    folder = SweepFolder(tmp_path / "mine")
    folder.path.mkdir()
    folder.start(plan)
    there, lost = dict.fromkeys(str(trial.reference) for trial in plan.trials)
    losses = {"forget_loss": 4.0, "retain_loss": 0.1}
    write_json(folder.references_path, {there: {"path": "there", "result": losses}, lost: {"error": "no memory"}})
    without = [trial.trial_id for trial in plan.trials if trial.reference == lost]
    assert view_for(plan, folder).name == "paper"
    assert view_for(plan, folder, out=without).name == "reference"  # the others are all that will run
    own = {"forget_quality": 1.0, "retain_utility": -0.1, "forget_loss": 2.0, "original_forget_loss": 0.0}
    end(plan, folder, [trial.trial_id for trial in plan.trials].index(without[0]), **own)
    rows = folder.compared_rows()
    assert view_for(plan, folder, out=without) == view_of(rows) == View("paper")


def test_how_a_search_stands_is_kept_with_its_view(tmp_path: Path) -> None:
    _, folder = started(tmp_path, name="random")
    assert folder.search_state() == {}
    write_search(folder, view=View("reference"), ended="enough", n_proposed=3)
    assert folder.search_state() == {"ended": "enough", "proposed": 3, "view": "reference", "left_out": 0}
