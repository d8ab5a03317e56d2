"""Tune's schedulers and stoppers on real Ray: trials that are stopped, paused, resumed and given the state of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hamu.data.sources import ImageData
from hamu.training.ray_workers import WorkerSettings
from launch.follow import Follow
from launch.live import Board
from launch.machine import Slots
from launch.on_tune import run_on_tune
from launch.shared import Original
from launch.signals import Signals
from launch.summary import warm_starts
from tests.launch.small_sweep import SmallSweep, run_to_end
from tune_spaces.space import Space

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

RATES = (0.005, 0.01, 0.02, 0.04)
SPACE = Space(
    name="digits/rates",
    summary="one trial a learning rate",
    base={
        "dataset_name": "digits", "num_train_epochs": 1, "unlearning_method": "hamu-q", "constraint_ratio": 0.1,
        "eval_strategy": "steps", "eval_steps": 2,
    },
    grids=({"learning_rate": RATES},),
)  # fmt: skip
STEPS = 11
SPLIT = ("gradient_pairing=split-gpu", "num_workers=2")
WORKERS = WorkerSettings(n_workers=2, cpus_per_worker=0.99, timeout_s=60)


class TunedSweep(SmallSweep):
    """A small sweep that Tune runs, in one slot, on the session's Ray."""

    def __init__(self, root: Path, digits: ImageData, original: Original, *, is_split: bool) -> None:
        super().__init__(root, digits, original, *(SPLIT if is_split else ()), space=SPACE)
        self.is_split = is_split

    def run(self, ray: Any, *, adjustable: tuple[str, ...] = (), **tune_with: Any) -> None:
        slots = Slots(count=1, cpus_per_trial=2, workers_per_trial=2) if self.is_split else Slots(count=1)
        shared = self.shared_by(ray.put, workers=WORKERS if self.is_split else None)
        with Board(self.plan, Console(quiet=True)) as board:
            follow = Follow(self.plan, self.folder, board, Signals())
            run_on_tune(shared, self.ids, slots, follow, adjustable=adjustable, **tune_with)

    def rows(self) -> list[dict[str, Any]]:
        return [self.row(trial_id) for trial_id in self.ids]


@pytest.fixture
def sequential(tmp_path: Path, digits: ImageData, original: Original) -> TunedSweep:
    return TunedSweep(tmp_path, digits, original, is_split=False)


@pytest.fixture
def split(tmp_path: Path, digits: ImageData, original: Original) -> TunedSweep:
    return TunedSweep(tmp_path, digits, original, is_split=True)


def assert_models_are_kept(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert (Path(row["model_path"]) / "model.safetensors").is_file()
        assert row["forget_loss"] is not None


def test_trials_that_a_scheduler_or_a_stopper_ends_are_pruned_with_their_models(ray_cluster: Any, split: TunedSweep) -> None:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    class StopFirst(tune.Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return result["config"]["learning_rate"] == RATES[0] and result["step"] >= 4

        def stop_all(self) -> bool:
            return False

    # The higher its rate, the more a trial forgets, so each is worse here than the one before.
    asha = ASHAScheduler(time_attr="step", metric="forget_quality", mode="min", grace_period=4, max_t=100, reduction_factor=2)
    split.run(ray_cluster, scheduler=asha, stopper=StopFirst(), adjustable=("learning_rate",))
    rows = split.rows()
    assert_models_are_kept(rows)
    assert [(row["status"], row["steps"]) for row in rows] == [("pruned", 4)] * 4
    assert split.folder.unfinished(split.plan) == []
    waits = warm_starts(rows)
    assert waits["n"] == 3  # one slot for all
    assert waits["max"] < 0.3, waits


@pytest.mark.parametrize("pairing", [pytest.param("sequential", marks=pytest.mark.soak), "split"])
def test_population_based_training_hands_states_on(ray_cluster: Any, request: pytest.FixtureRequest, pairing: str) -> None:
    from ray.tune.schedulers import PopulationBasedTraining

    sweep: TunedSweep = request.getfixturevalue(pairing)
    pbt = PopulationBasedTraining(
        time_attr="step", metric="forget_quality", mode="max", perturbation_interval=4,
        hyperparam_mutations={"learning_rate": [0.03, 0.05]}, quantile_fraction=0.5, resample_probability=1.0,
    )  # fmt: skip
    sweep.run(ray_cluster, scheduler=pbt, adjustable=("learning_rate",))
    rows = sweep.rows()
    assert_models_are_kept(rows)
    assert [(row["status"], row["steps"]) for row in rows] == [("finished", STEPS)] * 4
    assert {row["learning_rate"] for row in rows} - set(RATES)
    assert not list(sweep.folder.path.glob("trials/*/states"))


@pytest.mark.soak
def test_trials_that_take_turns_in_a_slot_end_with_the_bits_of_trials_that_do_not(
    ray_cluster: Any, sequential: TunedSweep, tmp_path: Path, digits: ImageData, original: Original
) -> None:
    from ray.tune.schedulers import PopulationBasedTraining

    turns = PopulationBasedTraining(  # without a quantile to exploit it only pauses and resumes
        time_attr="step", metric="forget_quality", mode="max", perturbation_interval=4,
        hyperparam_mutations={"learning_rate": list(RATES)}, quantile_fraction=0.0,
    )  # fmt: skip
    sequential.run(ray_cluster, scheduler=turns, adjustable=("learning_rate",))
    assert all(row["attempts"] > 1 for row in sequential.rows())
    alone = SmallSweep(tmp_path / "alone", digits, original, space=SPACE)
    slot = alone.slot()
    for trial_id in alone.ids:
        run_to_end(slot, trial_id)
        assert sequential.metrics(trial_id) == alone.metrics(trial_id)


@pytest.mark.soak
def test_trials_that_are_stopped_while_they_are_paused_are_completed(ray_cluster: Any, sequential: TunedSweep) -> None:
    from ray.tune.schedulers import HyperBandScheduler

    band = HyperBandScheduler(time_attr="step", metric="forget_quality", mode="max", max_t=9, reduction_factor=3)
    sequential.run(ray_cluster, scheduler=band)
    rows = sequential.rows()
    assert_models_are_kept(rows)
    assert [(row["status"], row["steps"]) for row in rows] == [("pruned", 10)] * 4
    assert sum(row["attempts"] > 1 for row in rows) >= 2
