"""What every space must be: a new file in tune_spaces/ is tested here without new test code."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from hamu.methods.catalog import METHODS
from hamu.methods.names import HAMU_METHODS
from hamu.tasks.catalog import modality_of
from launch.plan import Plan, make_plan
from tune_spaces.space import list_spaces, load_space


def plan_of(name: str) -> Plan:
    return make_plan(load_space(name), name="test", overrides={}, root=Path("artifacts"))


@pytest.mark.parametrize("name", list_spaces())
def test_every_trial_of_a_space_is_a_valid_unlearning_run(name: str) -> None:
    plan = plan_of(name)
    assert plan.trials
    assert all(config.is_unlearning for config in plan.configs.values())
    assert not any(plan.original(key).is_unlearning for key in plan.originals)


@pytest.mark.parametrize("name", list_spaces())
def test_no_setting_of_a_space_is_without_effect(name: str) -> None:
    assert [line for config in plan_of(name).configs.values() for line in config.warnings()] == []


@pytest.mark.parametrize("name", list_spaces())
def test_a_space_says_what_it_is_in_one_line(name: str) -> None:
    summary = load_space(name).summary
    assert summary
    assert "\n" not in summary


def test_the_quickstart_is_hamu_and_two_baselines_in_at_least_24_trials() -> None:
    methods = Counter(config.method_name for config in plan_of("digits/quickstart").configs.values())
    assert sum(methods.values()) >= 24
    assert set(HAMU_METHODS) < set(methods)
    assert len(methods) == 4


def test_the_constraint_sweep_is_the_published_one() -> None:
    configs = plan_of("cifar/constraint_sweep").configs.values()
    seen = {(config.method_name, round(10 * config.constraint_ratio)) for config in configs}  # type: ignore[operator]
    assert seen == {(method, tenth) for method in HAMU_METHODS for tenth in range(10)}
    for config in configs:
        assert config.lr == 1e-4
        assert config.training.per_device_train_batch_size == 5000
        assert config.training.num_train_epochs == 25
        assert config.freeze_batchnorm


def test_the_rho_sweep_is_seven_methods_at_five_rhos_from_one_original() -> None:
    plan = plan_of("cifar/rho_sweep")
    seen = {(config.method_name, config.data.hard_probability) for config in plan.configs.values()}
    methods = ("hamu-q", "hamu-u", "ft", "ga", "gdiff", "kl", "scrub")
    assert seen == {(method, rho) for method in methods for rho in (0.0, 0.25, 0.5, 0.75, 1.0)}
    assert len(plan.originals) == 1
    assert plan.original(*plan.originals).data.hard_probability == 0.0


@pytest.mark.parametrize("name", list_spaces())
def test_an_original_is_of_the_rows_of_its_trials(name: str) -> None:
    """But for what trials measure at their end: an original that is of other rows would be refused when they start from it."""
    plan = plan_of(name)
    originals = {key: plan.original(key).to_flat() for key in plan.originals}
    for trial in plan.trials:
        config = plan.configs[trial.trial_id]
        ours, theirs = config.to_flat(), originals[trial.original]
        same = set(modality_of(config).data_settings) - {"eval_tofu"}
        assert {key: theirs[key] for key in same} == {key: ours[key] for key in same}


def test_the_quickstart_of_language_models_is_about_twelve_trials_from_one_adapter() -> None:
    plan = plan_of("llm/quickstart")
    methods = Counter(config.method_name for config in plan.configs.values())
    assert methods == {"hamu-q": 4, "hamu-u": 2, "ga": 2, "gdiff": 2, "kl": 2}
    assert [config.training.add_lora for config in map(plan.original, plan.originals)] == [True]


def test_the_constraint_sweep_of_language_models_is_the_published_one() -> None:
    configs = plan_of("llm/constraint_sweep").configs.values()
    seen = {(config.method_name, round(10 * config.constraint_ratio)) for config in configs}  # type: ignore[operator]
    assert seen == {(method, tenth) for method in HAMU_METHODS for tenth in range(10)}
    for config in configs:
        assert (config.lr, config.training.per_device_train_batch_size, config.training.num_train_epochs) == (1e-4, 50, 10)
        assert (config.data.dataset_name, config.data.forget_pct) == ("waterdrum_tofu", 10)


def test_the_small_tofu_sweep_has_every_method() -> None:
    assert {config.method_name for config in plan_of("llm/tofu_small").configs.values()} == set(METHODS)
