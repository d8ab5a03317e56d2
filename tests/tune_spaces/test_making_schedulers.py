"""A scheduler fits the trials of its plan, or says why it does not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hamu.errors import ConfigError
from launch.plan import data_key, make_plan
from launch.scheduling import check_schedule, schedule_of, steps_of
from tune_spaces.schedulers import adjustable_of, balance, check_scheduler, make_scheduler
from tune_spaces.search import SearchSettings
from tune_spaces.space import Space

POOL = [
    {"unlearning_method": "hamu-q", "eval_strategy": "epoch", "learning_rate": lr, "constraint_ratio": 0.1} for lr in (0.02, 0.01)
]


def settings(scheduler: str = "pbt", **more: Any) -> SearchSettings:
    return SearchSettings(scheduler=scheduler, **more)


def test_balance_counts_forgetting_up_to_twice_the_loss_of_a_guess() -> None:
    assert balance({"forget_quality": 1.0, "retain_utility": -0.25, "n_classes": 10}) == 0.75
    assert balance({"forget_quality": 99.0, "retain_utility": 0.0, "n_classes": 10}) == pytest.approx(2 * math.log(10))
    assert balance({"forget_quality": 1.0}) is None


def test_only_what_varies_may_be_changed_in_order() -> None:
    assert adjustable_of(POOL) == {"learning_rate": [0.01, 0.02]}
    assert adjustable_of([*POOL, {"learning_rate": 0.01, "constraint_ratio": 0.3}])["constraint_ratio"] == [0.1, 0.3]
    assert adjustable_of([{"learning_rate": 0.01, "constraint_ratio": None}]) == {}


@pytest.mark.parametrize(
    ("given", "pool", "n_originals", "said"),
    [
        (settings("asha"), [{"eval_strategy": "no"}], 1, "eval_strategy is 'no'; use --set eval_strategy=epoch"),
        (settings("asha", score="forget_closeness"), POOL, 1, "use --score balance"),
        (settings(name="random"), POOL, 1, "with search 'random'.*--scheduler asha"),
        (settings(until="no-gain:3"), POOL, 1, "have nothing to choose"),
        (settings(), [*POOL, {"unlearning_method": "ft"}], 1, "got ft, hamu-q; choose one, e.g. --set method=hamu-q"),
        (settings(), POOL, 2, "all start from one original, got 2"),
        (settings(), POOL[:1], 1, "the trials have one value of each"),
    ],
)
def test_a_scheduler_that_the_trials_do_not_suit_is_refused(
    given: SearchSettings, pool: list[dict[str, Any]], n_originals: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_scheduler(given, pool, n_originals)


def test_a_scheduler_that_the_trials_suit_is_not_refused() -> None:
    check_scheduler(settings(), POOL, 1)
    check_scheduler(settings("asha", name="tpe", until="no-gain:3"), [*POOL, {"unlearning_method": "ft"}], 3)
    check_scheduler(SearchSettings(), [{"eval_strategy": "no"}], 5)


@pytest.mark.parametrize("name", ["asha", "pbt"])
def test_trials_that_end_before_the_first_decision_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="trials of 11 steps that evaluate every 11 end before it can decide"):
        make_scheduler(settings(name), {"learning_rate": [0.01, 0.02]}, every=11, total=11)


def test_no_scheduler_is_made_where_none_is_named() -> None:
    assert make_scheduler(SearchSettings(), {}, every=1, total=1) is None


@pytest.mark.slow
def test_halving_decides_at_evaluations_by_the_score_and_never_at_the_last_step() -> None:
    scheduler = make_scheduler(settings("asha", score="-retain_loss"), {}, every=4, total=36)
    assert scheduler.metric == "retain_loss"
    [bracket] = scheduler._brackets
    assert sorted(step for step, _ in bracket._rungs) == [4, 12]  # and not 36
    trials = [_Trial(str(i)) for i in range(4)]
    for trial in trials:
        scheduler.on_trial_add(None, trial)
    said = [scheduler.on_trial_result(None, trial, {"step": 4, "retain_loss": i}) for i, trial in enumerate(trials)]
    assert said == ["CONTINUE", "STOP", "STOP", "STOP"]  # the first is the best, less being better
    assert scheduler.on_trial_result(None, trials[0], {"step": 5}) == "CONTINUE"  # not evaluated yet
    assert scheduler.on_trial_result(None, trials[0], {"step": 36, "retain_loss": 9.0}) == "CONTINUE"


class _Trial:
    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


@pytest.mark.slow
def test_population_based_training_changes_what_varies_to_values_of_the_plan() -> None:
    scheduler = make_scheduler(settings(), adjustable_of(POOL), every=11, total=22)
    assert (scheduler.metric, scheduler._time_attr, scheduler._perturbation_interval) == ("balance", "step", 11)
    assert scheduler._hyperparam_mutations == {"learning_rate": [0.01, 0.02]}


SPACE = Space(
    name="digits/rates",
    summary="two rates",
    base={"dataset_name": "digits", "num_train_epochs": 2, "unlearning_method": "hamu-q", "constraint_ratio": 0.1},
    grids=({"learning_rate": (0.01, 0.02), "per_device_train_batch_size": (64, 100)},),
)


@pytest.mark.slow
def test_steps_are_counted_as_the_runs_count_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    from hamu.data.sources import load_image_data
    from hamu.tasks.vision import task_for
    from hamu.training.loop import TrainingRun

    plan = make_plan(SPACE, name="x", overrides={}, root=tmp_path_factory.mktemp("root"), search=settings("asha"))
    config = plan.configs[plan.trials[1].trial_id]
    rows = load_image_data(config.data)
    data = {data_key(config): rows}
    task = task_for(config, rows)
    run = TrainingRun(config, task, task.new_model(0))
    every, total = steps_of(config, data)
    assert (every, total) == (run.plan.steps_per_epoch, run.total_steps)
    check_schedule(plan)
    schedule = schedule_of(plan, data)
    per_epoch = max(steps_of(each, data)[0] or 0 for each in plan.configs.values())
    assert min(step for step, _ in schedule.scheduler._brackets[0]._rungs) == per_epoch > every
    assert schedule.adjustable == ()
