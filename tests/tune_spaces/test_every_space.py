"""What every space must be: a new file in tune_spaces/ is tested here without new test code."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from pathlib import Path

import pytest

from hamu.methods.catalog import METHODS
from hamu.methods.names import HAMU_METHODS
from hamu.tasks.catalog import modality_of
from launch.plan import Plan, make_plan
from tune_spaces.space import list_spaces, load_space

TRIALS = {
    "cifar/additional_baselines": 7,
    "cifar/batch_size_ablation": 5,
    "cifar/constraint_sweep": 20,
    "cifar/full_grad_ablation": 4,
    "cifar/grid": 360,
    "cifar/optimizer_ablation": 2,
    "cifar/rho_sweep": 35,
    "cifar/stopping_criterion": 4,
    "cifar/timing_all": 9,
    "llm/additional_baselines": 7,
    "llm/batch_size_ablation": 5,
    "llm/constraint_sweep": 20,
    "llm/full_grad_ablation": 4,
    "llm/optimizer_ablation": 4,
    "llm/semantic_similarity_sweep": 14,
    "llm/stopping_criterion": 2,
    "llm/timing_all": 9,
}
"""The experiments of the paper."""
PUBLISHED = {"cifar/full_grad_ablation": 1, "cifar/stopping_criterion": 2}
"""Where the published script has another number."""
ADAMW_LINE = "use_optimizer: AdamW changes HAMU's step, so its radius and constraint are not guaranteed"


@functools.cache
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
    """AdamW under HAMU has an effect, and is warned of."""
    said = {line for config in plan_of(name).configs.values() for line in config.warnings()}
    assert said == ({ADAMW_LINE} if name.endswith("/optimizer_ablation") else set())


@pytest.mark.parametrize("name", TRIALS)
def test_an_experiment_of_the_paper_has_its_number_of_trials_and_names_its_script(name: str) -> None:
    space = load_space(name)
    assert len(space.trials()) == len(plan_of(name).trials) == TRIALS[name]
    assert space.script is not None
    assert space.script.endswith(f" {space.sweep}")
    assert space.published == PUBLISHED.get(name)


def test_every_experiment_of_the_paper_is_in_the_table() -> None:
    assert {name for name in list_spaces() if load_space(name).script is not None} == set(TRIALS)


def test_the_experiments_of_the_paper_have_its_settings_but_for_what_they_vary() -> None:
    for name in TRIALS:
        varied = {key for grid in load_space(name).grids for key, values in grid.items() if len(values) > 1}
        is_image, is_timing = name.startswith("cifar/"), name.endswith("/timing_all")
        epochs = 1 if is_timing else 50 if name == "cifar/grid" else 25 if is_image else 10
        batch, model = (5000, "resnet20") if is_image else (50, "meta-llama/Llama-2-7b-chat-hf")
        for config in plan_of(name).configs.values():
            flat = config.to_flat()
            settings = {
                "dataset_name": "uoft-cs/cifar10" if is_image else "waterdrum_tofu",
                "model_name": model,
                "learning_rate": 1e-4,
                "per_device_train_batch_size": batch,
                "num_train_epochs": epochs,
                "seed": 42,
            }
            assert {key: flat[key] for key in settings if key not in varied} == {
                key: value for key, value in settings.items() if key not in varied
            }, name
            assert not is_image or config.freeze_batchnorm
            assert is_image or config.data.forget_pct == 10


def seen(name: str, *keys: str) -> Counter[tuple[object, ...]]:
    return Counter(tuple(config.to_flat()[key] for key in keys) for config in plan_of(name).configs.values())


HAMU = ("hamu-q", "hamu-u")
OTHERS = ("ft", "ga", "gdiff", "kl", "scrub", "gru", "pcgrad")


@pytest.mark.parametrize("task", ["cifar", "llm"])
def test_the_ablations_vary_what_they_are_named_for(task: str) -> None:
    full_grad = seen(
        f"{task}/full_grad_ablation", "unlearning_method", "full_grad", "constraint_ratio", "stop_on_stopping_criterion"
    )
    assert full_grad == Counter((method, whole, 0.5, True) for method in HAMU for whole in (False, True))
    sizes = (128, 256, 512, 1024, 2048) if task == "cifar" else (16, 32, 50, 64, 128)
    batch = seen(f"{task}/batch_size_ablation", "unlearning_method", "per_device_train_batch_size")
    assert batch == Counter(("hamu-q", size) for size in sizes)
    methods, ratio = (("hamu-u",), 0.9) if task == "cifar" else (HAMU, 0.5)
    optimizer = seen(f"{task}/optimizer_ablation", "unlearning_method", "use_optimizer", "constraint_ratio")
    assert optimizer == Counter((method, is_adamw, ratio) for method in methods for is_adamw in (False, True))
    assert seen(f"{task}/additional_baselines", "unlearning_method") == Counter((method,) for method in OTHERS)


@pytest.mark.parametrize("task", ["cifar", "llm"])
def test_the_timing_measures_every_method_for_one_epoch_without_evaluations_and_none_stops(task: str) -> None:
    keys = ("unlearning_method", "eval_strategy", "eval_at_ends", "save_strategy", "stop_on_stopping_criterion")
    assert seen(f"{task}/timing_all", *keys) == Counter((method, "no", False, "no", False) for method in (*HAMU, *OTHERS))
    hamu = [config for config in plan_of(f"{task}/timing_all").configs.values() if config.is_hamu]
    assert {config.on_infeasible for config in hamu} == {"continue"}


def test_the_stopping_criterion_is_compared_with_running_on() -> None:
    keys = (
        "unlearning_method",
        "hard_probability",
        "constraint_ratio",
        "stop_on_stopping_criterion",
        "continue_on_failed_feasibility",
    )
    modes = ((True, False), (False, True))
    assert seen("cifar/stopping_criterion", *keys) == Counter((method, 0.5, 0.5, *mode) for method in HAMU for mode in modes)
    assert seen("llm/stopping_criterion", *keys) == Counter((method, 0.0, 0.5, False, True) for method in HAMU)


def test_the_grid_is_seeds_rhos_rates_ratios_and_methods() -> None:
    axes = ((41, 42, 43), (0.0, 0.5, 1.0), (1e-5, 1e-4), tuple(tenth / 10 for tenth in range(10)), HAMU)
    keys = ("seed", "hard_probability", "learning_rate", "constraint_ratio", "unlearning_method")
    assert seen("cifar/grid", *keys) == Counter(itertools.product(*axes))


def test_the_similarity_sweep_is_seven_methods_with_and_without_duplicates_from_originals_of_their_own() -> None:
    methods = (*HAMU, "ft", "ga", "gdiff", "kl", "scrub")
    found = seen("llm/semantic_similarity_sweep", "unlearning_method", "add_duplicate_to_retain")
    assert found == Counter(itertools.product(methods, (False, True)))
    assert len(plan_of("llm/semantic_similarity_sweep").originals) == 2


def test_the_quickstarts_measure_against_a_retain_only_model() -> None:
    assert {name for name in list_spaces() if load_space(name).with_reference} == {"digits/quickstart", "llm/quickstart"}


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
