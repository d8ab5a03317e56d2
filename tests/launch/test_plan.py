"""A plan is laid out and checked before anything runs, and read back as it was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hamu.errors import ConfigError
from launch.plan import Plan, data_key, make_plan, read_overrides, trial_columns
from launch.plan_text import plan_text, setting_words
from tune_spaces.space import load_space

ROOT = Path("artifacts")


def plan_of(*assignments: str, space: str = "digits/quickstart") -> Plan:
    return make_plan(load_space(space), name="mine", overrides=read_overrides(assignments), root=ROOT)


def test_settings_are_read_as_their_types_under_all_their_names() -> None:
    read = read_overrides(["lr=0.1,0.2", "seed=3", "method=ft", "stop-on-loss-thresholds=yes", "original.epochs=2"])
    assert read == {
        "learning_rate": (0.1, 0.2),
        "seed": (3,),
        "unlearning_method": ("ft",),
        "stop_on_loss_thresholds": (True,),
        "original.num_train_epochs": (2.0,),
    }


def test_the_last_of_two_settings_counts_and_a_value_twice_is_one() -> None:
    assert read_overrides(["lr=0.1", "learning_rate=0.2,0.2"]) == {"learning_rate": (0.2,)}


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("lr", "a setting is key=value"),
        ("=1", "a setting is key=value"),
        ("lr=", "a value is empty"),
        ("lrr=1", "unknown key 'lrr'; did you mean 'lr'"),
        ("original.lrr=1", "did you mean 'original.lr'"),
        ("lr=fast", "learning_rate takes a number, got 'fast'"),
        ("device=cpu", "the sweep decides it; use --gpus"),
        ("artifact_root=x", "the sweep decides it; use --storage-path"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(assignment: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_overrides([assignment])


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["method=hamuq"], "unknown method 'hamuq'; did you mean 'hamu-q'"),
        (["rho=1.5"], r"rho\) must be in \[0, 1\], got 1.5"),
        (["constraint_ratio=1.5"], r"larger than radius \* max_grad_norm"),
        (["gradient_pairing=split-gpu", "num_workers=3"], "needs an even number of processes, got 3"),
        (["method=none"], "has no unlearning_method"),
        (["original.num_train_epochs=0"], "num_train_epochs must be > 0"),
    ],
)
def test_a_trial_that_cannot_run_is_refused_when_the_plan_is_made(assignments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_of(*assignments)


def test_a_plan_is_read_back_as_it_was_written() -> None:
    plan = plan_of("lr=0.1", "forget_class=1,2")
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())), ROOT)
    assert again == plan
    assert again.configs == plan.configs


def test_a_plan_read_back_keeps_the_defaults_it_was_made_with() -> None:
    stored = plan_of().to_json()
    stored["defaults"]["max_grad_norm"] = 2.5
    plan = Plan.from_json(stored, Path("/moved"))
    assert {config.training.max_grad_norm for config in plan.configs.values()} == {2.5}
    assert {config.run.artifact_root for config in plan.configs.values()} == {"/moved"}


def test_trials_share_an_original_for_each_class_and_seed_but_not_for_each_rho() -> None:
    assert len(plan_of("rho=0,0.5,1").originals) == 1
    assert len(plan_of("forget_class=0,1", "seed=1,2").originals) == 4
    original = plan_of("rho=0.5").original(*plan_of("rho=0.5").originals)
    assert original.data.hard_probability == 0.0
    assert original.data.add_forget_to_train
    assert original.training.target_test_accuracy == 0.9


def test_data_is_the_same_for_other_forget_sets_and_another_for_another_dataset() -> None:
    keys = {data_key(config) for config in plan_of("rho=0,1", "forget_class=1,2").configs.values()}
    assert len(keys) == 1
    assert keys != {data_key(config) for config in plan_of("dataset_name=cifar10").configs.values()}


def test_a_trial_in_words_has_what_differs() -> None:
    plan = plan_of()
    assert trial_columns(plan) == ("unlearning_method", "learning_rate", "constraint_ratio")
    words = [setting_words(trial, trial_columns(plan)) for trial in plan.trials]
    assert len(set(words)) == len(words)
    assert words[0].startswith("hamu-q, lr ")


def test_the_last_line_of_a_plan_is_the_number_of_its_trials() -> None:
    from launch.machine import Machine, Slots

    machine = Machine(cpus=2, cpu_name="a core", memory_bytes=2**30, gpus=0)
    plan = plan_of("method=ft")
    lines = plan_text(plan, machine=machine, slots=Slots(count=2), folder="here").splitlines()
    assert lines[-1] == f"trials: {len(plan.trials)}"
    assert sum(line.startswith("0") for line in lines) == len(plan.trials)
