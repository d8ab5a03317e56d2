"""A scheduler fits the trials of its plan, or says why it does not."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

from hamu.errors import ConfigError
from hamu.training.config import TrainConfig
from hamu.training.steps import steps_per_epoch, total_steps
from launch.plan import data_key, make_plan
from launch.scheduling import check_schedule, schedule_of, steps_of
from tune_spaces.schedulers import SCHEDULERS, Scheduler, adjustable_of, balance, check_scheduler, make_scheduler
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


def test_a_scheduler_is_what_its_entry_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(settings: SearchSettings, adjustable: Any, *, every: int, total: int) -> str:
        return f"{settings.score} {every} {total}"

    monkeypatch.setitem(SCHEDULERS, "mine", Scheduler(make=make, pauses=False))
    assert make_scheduler(settings("mine", score="forget_loss"), {}, every=2, total=9) == "forget_loss 2 9"
    check_scheduler(settings("mine", name="random"), POOL, 5)  # it does not pause


class _Member(_Trial):
    status, experiment_tag = "RUNNING", ""

    def __init__(self, trial_id: str, rate: float) -> None:
        super().__init__(trial_id)
        self.config = {"learning_rate": rate}
        manager = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
        self.run_metadata = SimpleNamespace(checkpoint_manager=manager)

    def is_finished(self) -> bool:
        return False


class _Population:
    """Tune's controller as population based training sees it: no trial waits, and whose state is handed to whom is noted."""

    search_alg = None

    def __init__(self, trials: list[Any]) -> None:
        self.trials = trials

    def get_trials(self) -> list[Any]:
        return self.trials

    def _schedule_trial_save(self, trial: Any, **settings: Any) -> str:
        return "a checkpoint"


@pytest.mark.slow
def test_population_based_training_chooses_by_its_own_seed_and_leaves_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = [0.001 * (index + 1) for index in range(8)]

    def choices(seed: int, *, noise: int) -> list[tuple[str, str, float]]:
        scheduler = make_scheduler(settings(seed=seed), {"learning_rate": rates}, every=1, total=99)
        handed: list[tuple[str, str, float]] = []
        trials = [_Member(str(i), rate) for i, rate in enumerate(rates)]

        def hand_on(controller: Any, trial: Any, better: Any) -> None:
            config, _ = scheduler._get_new_config(trial, better)
            handed.append((trial.trial_id, better.trial_id, config["learning_rate"]))

        monkeypatch.setattr(scheduler, "_exploit", hand_on)
        controller, random_draws = _Population(trials), random.Random(noise)
        for trial in controller.trials:
            scheduler.on_trial_add(controller, trial)
        for step in range(1, 9):
            for index, trial in enumerate(controller.trials):
                random.seed(random_draws.random())  # what others draw meanwhile
                before = random.getstate()
                scheduler.on_trial_result(controller, trial, {"step": step, "balance": index})
                assert random.getstate() == before
        return handed

    first = choices(1, noise=1)
    assert len(first) > 5
    assert choices(1, noise=2) == first
    assert choices(2, noise=1) != first


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


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, 30),
        ({"gradient_accumulation_steps": 4}, 120),
        ({"gradient_pairing": "split-gpu", "num_workers": 2}, 30),  # the two share the rows of one
        ({"gradient_pairing": "split-gpu", "num_workers": 6, "gradient_accumulation_steps": 2}, 180),
        ({"method": "none", "gradient_pairing": "split-gpu", "num_workers": 2, "freeze_batchnorm": True}, 60),
    ],
)
def test_the_rows_of_a_step_are_those_of_a_pair_of_processes_and_in_training_of_each(settings: dict[str, Any], rows: int) -> None:
    config = TrainConfig.from_flat({"method": "hamu-q", "constraint_ratio": 0.1, "batch_size": 30, **settings})
    assert config.rows_per_step == rows


@pytest.mark.parametrize(
    ("n_retain", "rows", "n_epochs", "per_epoch", "total"),
    [(1298, 128, 1, 11, 11), (1280, 128, 2.5, 10, 25), (1, 128, 0.1, 1, 1), (1298, 1, 0.5, 1298, 649)],
)
def test_an_epoch_is_the_retain_rows_once_and_a_run_at_least_a_step(
    n_retain: int, rows: int, n_epochs: float, per_epoch: int, total: int
) -> None:
    assert steps_per_epoch(n_retain, rows) == per_epoch
    assert total_steps(n_epochs, per_epoch) == total
