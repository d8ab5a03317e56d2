"""A plan is laid out and checked before anything runs, and read back as it was written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hamu.errors import ConfigError
from launch.machine import Machine, Slots
from launch.plan import Plan, data_key, make_plan, read_overrides, trial_columns
from launch.plan_text import plan_text, setting_words
from tune_spaces.search import SearchSettings
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
        ("lr=0.2..0.1", "learning_rate=0.2..0.1: a range goes up between two finite numbers; give low < high"),
        ("lr=0.1..inf", "between two finite numbers"),
        ("lr=0.1..0.2:1", "a range has at least 2 values, got n 1; give learning_rate=0.1"),
        ("lr=0.1..0.2:few", "takes a whole number, got 'few'"),
        ("lr=..3", r"a range is low..high:n; give e.g. learning_rate=1..8:4"),
        ("seed=1..3:5", "there are 3 whole numbers from 1 to 3, not 5; give fewer"),
        ("seed=1..2.5", "seed takes a whole number, got '2.5'"),
        ("lr=1.00001..1.00002:9", "9 values of 4 digits do not fit between 1.00001 and 1.00002"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(assignment: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_overrides([assignment])


@pytest.mark.parametrize(
    ("assignment", "values"),
    [
        ("lr=0.01..0.16:5", (0.01, 0.02, 0.04, 0.08, 0.16)),  # by ratio
        ("lr=1e-5..1e-3:3", (1e-5, 1e-4, 1e-3)),
        ("lr=0.005..0.08", (0.005, 0.007071, 0.01, 0.01414, 0.02, 0.02828, 0.04, 0.05657, 0.08)),  # nine, of four digits
        ("constraint_ratio=0..0.8:5", (0.0, 0.2, 0.4, 0.6, 0.8)),  # evenly, from zero
        ("constraint_ratio=0.2..0.6:3", (0.2, 0.4, 0.6)),  # evenly, less than four times apart
        ("batch_size=16..256:5", (16, 32, 64, 128, 256)),
        ("seed=41..43", (41, 42, 43)),  # no more whole numbers than there are
        ("batch_size=1..10:9", (1, 2, 3, 4, 5, 6, 7, 8, 10)),  # which differ
        ("lr=0.1,0.2..0.3:2", (0.1, 0.2, 0.3)),
        ("dataset_name=../cifar10", ("../cifar10",)),  # a path
    ],
)
def test_a_range_is_values_from_end_to_end(assignment: str, values: tuple[object, ...]) -> None:
    (read,) = read_overrides([assignment]).values()
    assert read == values


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
    assert original.training.num_train_epochs == 2


def test_an_original_and_its_retain_only_model_are_trained_as_long() -> None:
    """A target of accuracy on all classes would end the one and not the other."""
    plan = plan_of()
    (original,), (reference,) = map(plan.original, plan.originals), map(plan.reference, plan.references)
    assert original.training == reference.training
    assert original.training.target_test_accuracy is None


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


def text_of(plan: Plan) -> list[str]:
    machine = Machine(cpus=2, cpu_name="a core", memory_bytes=2**30, gpus=0)
    return plan_text(plan, machine=machine, slots=Slots(count=2), folder="here").splitlines()


def lines_of(plan: Plan, word: str) -> list[str]:
    return [line.removeprefix(word).strip() for line in text_of(plan) if line.split()[:1] == [word]]


def test_the_last_line_of_a_plan_is_the_number_of_its_trials() -> None:
    plan = plan_of("method=ft")
    lines = text_of(plan)
    assert lines[-1] == f"trials: {len(plan.trials)}"
    assert sum(line.startswith("0") for line in lines) == len(plan.trials)


def test_a_search_runs_some_of_the_trials_that_a_plan_lists() -> None:
    search = SearchSettings(name="tpe", trials=5, until="no-gain:3", scheduler="asha", score="retain_accuracy")
    plan = make_plan(load_space("digits/quickstart"), name="mine", overrides={}, root=ROOT, search=search)
    lines = text_of(plan)
    assert (plan.n_to_run, lines[-1]) == (5, "trials: 5")
    assert sum(line.startswith("0") for line in lines) == len(plan.trials) == 26
    (said,) = lines_of(plan, "search")
    assert said == "tpe: at most 5 of the 26 trials below, until no-gain:3, scheduler asha by retain_accuracy"
    assert lines_of(plan_of(), "search") == ["grid: all 26 trials"]


def test_a_target_and_what_it_keeps_are_said() -> None:
    search = SearchSettings(name="random", target=("forget_accuracy<=retrained",), keep=("retain_accuracy>=original-0.01",))
    plan = make_plan(load_space("digits/quickstart"), name="mine", overrides={}, root=ROOT, search=search)
    (said,) = lines_of(plan, "search")
    assert said.endswith("target forget_accuracy<=retrained, keep retain_accuracy>=original-0.01")


def test_a_space_chooses_its_search_where_the_user_does_not() -> None:
    space = replace(load_space("digits/quickstart"), search="nsga2", scheduler="asha", score="-forget_accuracy")
    plan = make_plan(space, name="mine", overrides={}, root=ROOT)
    assert plan.search == SearchSettings(name="nsga2", scheduler="asha", score="-forget_accuracy")
    assert make_plan(space, name="mine", overrides={}, root=ROOT, search=SearchSettings()).search == SearchSettings()


def test_a_plan_names_the_published_script_and_its_count_where_it_differs() -> None:
    assert lines_of(plan_of(space="cifar/rho_sweep"), "published") == ["cifar10 rho_sweep"]
    assert lines_of(plan_of(space="cifar/stopping_criterion"), "published") == ["cifar10 stopping_criterion: 2 trials; here 4"]
    assert lines_of(plan_of(), "published") == []


def test_a_small_plan_says_so() -> None:
    small = make_plan(load_space("cifar/rho_sweep"), name="mine", overrides={}, root=ROOT, scale="small")
    assert len(lines_of(small, "scale")) == 1
    assert lines_of(plan_of(space="cifar/rho_sweep"), "scale") == []


def test_a_reference_is_the_retain_only_model_of_a_forget_set_by_the_recipe_of_the_original() -> None:
    space = load_space("cifar/rho_sweep")
    plan = make_plan(space, name="mine", overrides=read_overrides(["seed=1,2"]), root=ROOT, with_reference=True)
    assert (len(plan.originals), len(plan.references)) == (2, 10)
    for trial in plan.trials:
        assert trial.reference is not None
        original, reference = plan.original(trial.original).to_flat(), plan.reference(trial.reference).to_flat()
        differing = {key for key in original if original[key] != reference[key]}
        assert differing - {"hard_probability"} == {"add_forget_to_train"}
        assert not reference["add_forget_to_train"]
        config = plan.configs[trial.trial_id]
        assert (reference["hard_probability"], reference["seed"]) == (config.data.hard_probability, config.run.seed)
    assert len(lines_of(plan, "reference")) == 10


def test_references_are_as_the_space_says_unless_the_user_does() -> None:
    space = load_space("digits/quickstart")
    for asked, n in ((None, 1), (False, 0), (True, 1)):
        plan = make_plan(space, name="mine", overrides={}, root=ROOT, with_reference=asked)
        assert len(plan.references) == n
        assert {trial.reference is not None for trial in plan.trials} == {n == 1}
    assert make_plan(load_space("cifar/grid"), name="mine", overrides={}, root=ROOT).references == {}


def test_a_plan_with_a_search_references_and_a_scale_is_read_back_as_it_was_written() -> None:
    search = SearchSettings(name="random", trials=3, target=("forget_accuracy<=0.1",))
    plan = make_plan(
        load_space("cifar/rho_sweep"), name="mine", overrides={}, root=ROOT, scale="small", search=search, with_reference=True
    )
    assert Plan.from_json(json.loads(json.dumps(plan.to_json())), ROOT) == plan


def test_a_plan_of_before_searches_is_read_as_a_whole_grid_without_references() -> None:
    plan = plan_of(space="cifar/constraint_sweep")
    stored = json.loads(json.dumps(plan.to_json()))
    for key in ("search", "references", "scale", "script", "published"):
        del stored[key]
    for trial in stored["trials"]:
        del trial["reference"]
    again = Plan.from_json(stored, ROOT)
    assert (again.search, again.references, again.scale, again.n_to_run) == (SearchSettings(), {}, "full", 20)
    assert again.trials == plan.trials


def test_a_misspelt_key_of_a_space_fails_when_the_plan_is_made() -> None:
    space = load_space("cifar/rho_sweep")
    misspelt = replace(space, base={**space.base, "learning_rte": 1e-4})
    with pytest.raises(ConfigError, match="unknown key 'learning_rte'; did you mean 'learning_rate'"):
        make_plan(misspelt, name="mine", overrides={}, root=ROOT)
    with pytest.raises(ConfigError, match="unknown key 'epoch'"):
        make_plan(replace(space, original={"epoch": 3}), name="mine", overrides={}, root=ROOT)
