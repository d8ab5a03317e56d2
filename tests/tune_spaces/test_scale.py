"""`small` maps any space onto embedded data, trial by trial; axes stay axes, and what the user set stays as it was set."""

from __future__ import annotations

from pathlib import Path

import pytest

from hamu.errors import ConfigError
from hamu.tasks.catalog import modality_of
from launch.plan import Plan, make_plan, read_overrides
from tune_spaces.scale import SCALES
from tune_spaces.space import Space, list_spaces, load_space

EMBEDDED = ("digits/quickstart", "llm/quickstart")
SCALED = tuple(name for name in list_spaces() if name not in EMBEDDED)


def plan_of(name: str, *assignments: str, scale: str = "small") -> Plan:
    return make_plan(load_space(name), name="test", overrides=read_overrides(assignments), root=Path("artifacts"), scale=scale)


def axes_of(space: Space) -> dict[str, int]:
    """Number of values of each setting that the trials of one method have several of; the most over methods."""
    found: dict[tuple[str, str], set[object]] = {}
    for trial in space.trials():
        for key, value in trial.config.items():
            found.setdefault((trial.config["unlearning_method"], key), set()).add(value)
    axes: dict[str, int] = {}
    for (_, key), values in found.items():
        axes[key] = max(axes.get(key, 1), len(values))
    return {key: n for key, n in axes.items() if n > 1}


@pytest.mark.parametrize("name", SCALED)
def test_a_small_space_is_on_embedded_data_and_a_built_in_model(name: str) -> None:
    plan = plan_of(name)
    for config in (*plan.configs.values(), *map(plan.original, plan.originals)):
        assert config.data.dataset_name in modality_of(config).datasets
        assert config.run.model_name in modality_of(config).models
        assert config.training.precision == "fp32"


@pytest.mark.parametrize("name", SCALED)
def test_a_small_space_has_the_trials_and_the_axes_of_the_full_one_in_order(name: str) -> None:
    overrides = {"forget_pct": (5, 10)} if name == "llm/tofu_llama_3_2_1b" else {}  # authors has no 1 %
    full = load_space(name).with_overrides(overrides)
    small = full.scaled("small")
    methods = [[trial.config["unlearning_method"] for trial in space.trials()] for space in (full, small)]
    assert methods[0] == methods[1]
    assert axes_of(full).items() <= axes_of(small).items()  # rates differ by optimizer besides


@pytest.mark.parametrize("name", SCALED)
def test_ratios_of_a_small_space_are_shares_of_s(name: str) -> None:
    configs = plan_of(name).configs.values()
    assert {(config.is_hamu, config.method.relative_constraint) for config in configs} <= {(True, True), (False, False)}


@pytest.mark.parametrize("name", list_spaces())
def test_a_small_space_has_no_setting_without_effect(name: str) -> None:
    said = {line for config in plan_of(name).configs.values() for line in config.warnings()}
    assert all(line.startswith("use_optimizer: AdamW changes HAMU's step") for line in said)


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_space_on_embedded_data_stays_as_it_is(name: str) -> None:
    assert load_space(name).scaled("small") == load_space(name)


def test_what_the_user_set_is_not_scaled() -> None:
    plan = plan_of("cifar/constraint_sweep", "lr=0.03", "constraint_ratio=0.4", "batch_size=64", "original.epochs=5")
    for config in plan.configs.values():
        assert (config.lr, config.constraint_ratio, config.training.per_device_train_batch_size) == (0.03, 0.4, 64)
        assert config.data.dataset_name == "digits"
    (original,) = map(plan.original, plan.originals)
    assert original.training.num_train_epochs == 5


def test_embedded_data_that_the_user_names_does_not_leave_published_rates_on_it() -> None:
    assert plan_of("cifar/rho_sweep", "dataset_name=digits").trials == plan_of("cifar/rho_sweep").trials


def test_seeds_multiply_a_small_space() -> None:
    plan = plan_of("cifar/rho_sweep", "seed=41,42,43")
    assert len(plan.trials) == 3 * 35
    assert len(plan.originals) == 3


def test_batch_sizes_scale_with_their_square_root_and_rates_and_epochs_by_factors() -> None:
    sizes = [config.training.per_device_train_batch_size for config in plan_of("cifar/batch_size_ablation").configs.values()]
    assert sizes == [20, 29, 41, 58, 82]
    grid = plan_of("cifar/grid").configs.values()
    assert {config.lr for config in grid} == {0.002, 0.02}
    assert {config.training.num_train_epochs for config in grid} == {3.0}
    assert {config.training.num_train_epochs for config in plan_of("cifar/timing_all").configs.values()} == {1.0}


def test_full_changes_nothing_and_another_scale_is_refused() -> None:
    space = load_space("cifar/grid")
    assert space.scaled("full") == space
    assert set(SCALES) == {"full", "small"}
    with pytest.raises(ConfigError, match="unknown scale 'smal'; did you mean 'small'"):
        space.scaled("smal")
