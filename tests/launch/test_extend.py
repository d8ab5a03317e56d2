"""Going on with a sweep whose space has changed, and adding trials to one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hamu.errors import ConfigError
from launch import extend
from launch.extend import check_unchanged, extended
from launch.plan import Plan, key_of, make_plan, read_overrides
from tune_spaces.space import Space, load_space

SPACE = "digits/quickstart"


def plan_of(root: Path, *assignments: str, with_reference: bool | None = None) -> Plan:
    return make_plan(
        load_space(SPACE), name="mine", overrides=read_overrides(assignments), root=root, with_reference=with_reference
    )


def now_is(monkeypatch: pytest.MonkeyPatch, space: Space) -> None:
    monkeypatch.setattr(extend, "load_space", lambda name: space)


def test_a_plan_whose_space_is_as_it_was_goes_on(tmp_path: Path) -> None:
    check_unchanged(plan_of(tmp_path, "lr=0.01,0.02", "method=hamu-q,ft"))
    stored = json.loads(json.dumps(plan_of(tmp_path, "seed=1,2").to_json()))
    check_unchanged(Plan.from_json(stored, tmp_path))


def test_a_changed_space_is_refused_by_what_is_new_and_what_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, space = plan_of(tmp_path, "lr=0.01"), load_space(SPACE)
    now_is(monkeypatch, replace(space, base={**space.base, "num_train_epochs": 3}))
    n = len(plan.trials)
    with pytest.raises(ConfigError, match=rf"have changed since sweep 'mine' began: {n} new \(.*\), {n} gone \(.*--extend"):
        check_unchanged(plan)


def test_extending_by_values_keeps_every_trial_and_adds_the_others_behind(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "lr=0.01,0.02", "method=ft")
    grown = extended(plan, read_overrides(["lr=0.02,0.04"]))
    assert grown.trials[: len(plan.trials)] == plan.trials
    assert [trial.config["learning_rate"] for trial in grown.trials[len(plan.trials) :]] == [0.04]
    assert grown.trials[-1].trial_id.startswith(f"{len(plan.trials):04d}-ft-")
    assert len({key_of(trial.trial_id) for trial in grown.trials}) == len(grown.trials)
    again = Plan.from_json(json.loads(json.dumps(grown.to_json())), tmp_path)
    check_unchanged(again)
    assert [trial.trial_id for trial in extended(again, read_overrides(["lr=0.08"])).trials][:-1] == [
        trial.trial_id for trial in grown.trials
    ]


def test_a_new_seed_brings_its_original_and_its_reference(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "method=ft", "lr=0.01", "seed=1", with_reference=True)
    grown = extended(plan, read_overrides(["seed=2"]))
    added = grown.trials[len(plan.trials) :]
    assert {trial.config["seed"] for trial in added} == {2}
    assert len(grown.originals) == len(grown.references) == 2
    assert all(grown.original(trial.original).run.seed == 2 for trial in added)
    assert grown.configs[added[0].trial_id].run.seed == 2


def test_what_is_gone_stays_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, space = plan_of(tmp_path, "lr=0.01"), load_space(SPACE)
    now_is(monkeypatch, replace(space, base={**space.base, "num_train_epochs": 3}))
    grown = extended(plan, {})
    assert grown.trials[: len(plan.trials)] == plan.trials
    assert len(grown.trials) == 2 * len(plan.trials)
    check_unchanged(Plan.from_json(json.loads(json.dumps(grown.to_json())), tmp_path))


def test_what_is_there_already_is_not_added_again(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "lr=0.01")
    assert extended(plan, {}).trials == plan.trials
    assert extended(plan, read_overrides(["lr=0.01"])).trials == plan.trials


def test_a_plan_without_its_space_stands_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path)
    monkeypatch.setattr(extend, "list_spaces", lambda: [])
    check_unchanged(plan)


def test_an_original_that_is_trained_in_another_way_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, space = plan_of(tmp_path, "lr=0.01"), load_space(SPACE)
    with pytest.raises(ConfigError, match="a sweep keeps its originals"):
        extended(plan, read_overrides(["original.num_train_epochs=3"]))
    now_is(monkeypatch, replace(space, original={**space.original, "learning_rate": 0.5}))
    with pytest.raises(ConfigError, match="trains its originals in another way"):
        check_unchanged(plan)
