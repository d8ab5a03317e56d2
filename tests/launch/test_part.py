"""Shares of a sweep's trials: together all of them, each once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hamu.errors import ConfigError
from launch.part import Part, read_part
from launch.plan import Plan, make_plan, read_overrides
from launch.standing import standing
from tune_spaces.search import SearchSettings
from tune_spaces.space import load_space


def plan_of(root: Path, search: SearchSettings | None = None, *assignments: str) -> Plan:
    space = load_space("digits/quickstart")
    return make_plan(space, name="mine", overrides=read_overrides(assignments), root=root, search=search)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_shares_are_all_trials_each_once(tmp_path: Path, count: int) -> None:
    whole = plan_of(tmp_path)
    plans = [Part(index=index, count=count).plan(whole) for index in range(1, count + 1)]
    given = [trial.trial_id for plan in plans for trial in plan.trials]
    assert sorted(given) == sorted(trial.trial_id for trial in whole.trials)
    sizes = [len(plan.trials) for plan in plans]
    assert max(sizes) - min(sizes) <= 1
    assert [plan.n_to_run for plan in plans] == sizes


def test_a_share_has_the_originals_of_its_own_trials_only(tmp_path: Path) -> None:
    whole = plan_of(tmp_path, None, "method=ft", "lr=0.01", "seed=1,2")
    first = Part(index=1, count=2).plan(whole)
    assert {first.original(key).run.seed for key in first.originals} == {trial.config["seed"] for trial in first.trials}
    assert len(first.originals) == 1


def test_rows_of_other_shares_do_not_count_as_ended(tmp_path: Path) -> None:
    whole = plan_of(tmp_path)
    first, second = (Part(index=index, count=2).plan(whole) for index in (1, 2))
    rows = {trial.trial_id: {"status": "finished"} for trial in first.trials}
    assert standing(first, rows).n_left == 0
    assert standing(second, rows).n_ended == 0
    assert standing(second, rows).n_left == len(second.trials)


@pytest.mark.parametrize("search", [SearchSettings(name="random"), SearchSettings(scheduler="asha")])
def test_a_search_cannot_be_shared_out(tmp_path: Path, search: SearchSettings) -> None:
    with pytest.raises(ConfigError, match="cannot be shared out"):
        Part(index=1, count=2).plan(plan_of(tmp_path, search))


def test_more_shares_than_trials_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give fewer parts"):
        Part(index=1, count=99).plan(plan_of(tmp_path))


@pytest.mark.parametrize("text", ["", "1", "0/4", "5/4", "1/0", "a/b", "1/4/2", "-1/4"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="the I-th of N shares"):
        read_part(text)
