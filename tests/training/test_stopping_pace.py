"""When the stopping criterion ends a run: at once, after several steps in a row, or already below its bound."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hamu.errors import ConfigError
from hamu.methods.hardness import Hardness
from hamu.tasks.vision import VisionTask
from hamu.training.config import TrainConfig
from hamu.training.ends import is_firing
from hamu.training.loop import TrainingRun
from hamu.training.records import Recorder, read_records
from hamu.training.stop import StopReason
from tests.training.small_digits import copy_of, unlearning

RATIO = 0.25


def stopping(**settings: Any) -> TrainConfig:
    """Steps on where the constraint is infeasible, so that only the criterion ends it."""
    given = {"constraint_ratio": RATIO, "stop_on_stopping_criterion": True, "continue_on_failed_feasibility": True, "lr": 0.001}
    return unlearning(**given, epochs=1, batch_size=32, eval_strategy="no", **settings)


def steps_of(config: TrainConfig, task: VisionTask, model: nn.Module, folder: Path) -> tuple[TrainingRun, list[dict[str, Any]]]:
    run = TrainingRun(config, task, model, recorder=Recorder(folder, {"trial_id": "one"}))
    list(run)
    return run, [row for row in read_records(folder).to_pylist() if row["kind"] == "step"]


def first_of_k_in_a_row(fires: list[bool], k: int) -> int | None:
    """Index of the k-th step of the first k that fire in a row."""
    counts = itertools.accumulate(fires, lambda count, fired: count + 1 if fired else 0, initial=0)
    return next((index for index, count in enumerate(counts) if count == k), None)


@pytest.fixture(scope="module")
def unstopped(digits_task: VisionTask, digits_model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The steps of a run on which the criterion fires now and then, and ends nothing."""
    config = stopping().replace(stop_on_stopping_criterion=False)
    _, rows = steps_of(config, digits_task, copy_of(digits_model), tmp_path_factory.mktemp("records"))
    return rows


@pytest.mark.parametrize("patience", [1, 2, 4])
@pytest.mark.parametrize("rule", ["aggregate", "feasible"])
def test_a_run_ends_at_the_kth_firing_in_a_row_and_takes_the_steps_before(
    rule: str, patience: int, unstopped: list[dict[str, Any]], digits_task: VisionTask, digits_model: nn.Module, tmp_path: Path
) -> None:
    column = {"aggregate": "stopping_margin", "feasible": "feasible_margin"}[rule]
    expected = first_of_k_in_a_row([row[column] > 0 for row in unstopped], patience)
    assert expected is not None, "the case must fire"
    config = stopping(stopping_rule=rule, stopping_patience=patience)
    run, rows = steps_of(config, digits_task, copy_of(digits_model), tmp_path)
    assert run.result is not None and run.result.message is not None
    assert run.result.stop_reason is StopReason.CRITERION
    assert run.result.steps == expected - 1
    assert (f"({patience} steps in a row)" in run.result.message) == (patience > 1)
    # Margins are recorded as they are, whatever the patience.
    assert [row[column] for row in rows] == [row[column] for row in unstopped[: len(rows)]]


def test_more_patience_never_ends_a_run_earlier(unstopped: list[dict[str, Any]]) -> None:
    fires = [row["stopping_margin"] > 0 for row in unstopped]
    assert True in fires and False in fires, "the case must change its mind"


def test_an_infeasible_step_ends_a_patient_run_at_once(digits_task: VisionTask, digits_model: nn.Module) -> None:
    config = stopping(stopping_patience=5).replace(constraint_ratio=0.9, continue_on_failed_feasibility=False)
    run = TrainingRun(config, digits_task, copy_of(digits_model))
    list(run)
    assert run.result is not None
    assert run.result.stop_reason is StopReason.INFEASIBLE and run.result.steps == 0


def test_the_count_of_firings_is_part_of_a_checkpoint(
    unstopped: list[dict[str, Any]], digits_task: VisionTask, digits_model: nn.Module, tmp_path: Path
) -> None:
    fires = [row["stopping_margin"] > 0 for row in unstopped]
    end = first_of_k_in_a_row(fires, 3)
    assert end is not None
    config = stopping(stopping_patience=3)

    def run(folder: Path, die_at: int | None = None) -> TrainingRun:
        made = TrainingRun(config, digits_task, copy_of(digits_model), checkpoint_path=folder / "checkpoint.pt")
        for row in made:
            if row["step"] == die_at:
                made.save()
                break
        return made

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", die_at=end - 2)  # after the first two of the three firings in a row
    resumed = run(tmp_path / "parts")
    assert whole.result is not None and resumed.result is not None
    times = {"train_s": 0, "steps_s": 0}
    assert whole.result.stop_reason is StopReason.CRITERION
    assert dataclasses.asdict(resumed.result) | times == dataclasses.asdict(whole.result) | times
    assert all(torch.equal(*pair) for pair in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def hardness(*, constraint: float, aggregate: float, feasible: float, lr: float) -> Hardness:
    return Hardness(
        kappa=0.0,
        gradient_product=1.0,
        stopping_rhs=aggregate,
        margins={"aggregate": constraint - aggregate, "feasible": constraint - feasible, "predicted": -1.0},
        max_constraint_ratio=feasible / lr,
        split_constraint_ratio=1.0,
        predicted_retain_change=0.0,
        predicted_forget_change=0.0,
        block_ratios=np.array([feasible / lr]),
    )


@pytest.mark.parametrize("rule", ["aggregate", "feasible"])
@pytest.mark.parametrize("softness", [0.0, 0.1, 0.9])
def test_a_soft_rule_fires_above_its_share_of_the_bound_and_not_below(rule: str, softness: float) -> None:
    lr, bounds = 0.01, {"aggregate": 2e-3, "feasible": 5e-3}
    config = stopping(stopping_rule=rule, stopping_softness=softness)
    edge = (1 - softness) * bounds[rule]
    # 1e-9 is far above the rounding of three products, about 1e-16.
    for factor, fires in ((1 - 1e-9, False), (1 + 1e-9, True)):
        assert is_firing(hardness(constraint=edge * factor, **bounds, lr=lr), config=config, lr=lr) is fires
    never = config.replace(stop_on_stopping_criterion=False)
    assert not is_firing(hardness(constraint=1.0, **bounds, lr=lr), config=never, lr=lr)


def test_a_soft_run_ends_where_its_share_of_the_bound_is_passed_and_says_so(
    digits_task: VisionTask, digits_model: nn.Module, tmp_path: Path
) -> None:
    soft = {"constraint_ratio": 0.05, "stop_on_stopping_criterion": False}
    _, rows = steps_of(stopping().replace(**soft), digits_task, copy_of(digits_model), tmp_path)
    ends = []
    for softness in (0.0, 0.1, 0.5):
        config = stopping(stopping_softness=softness).replace(constraint_ratio=0.05)
        run = TrainingRun(config, digits_task, copy_of(digits_model))
        list(run)
        assert run.result is not None
        fires = (0.05 * config.lr > (1 - softness) * row["stopping_rhs"] for row in rows)
        assert run.result.steps == next((index for index, fired in enumerate(fires) if fired), len(rows))
        ends.append(run.result.steps)
        said = f"is above {1 - softness:.4g} of the aggregate rule's bound"
        assert run.result.message is None or (said in run.result.message) == (softness > 0)
    assert ends == sorted(ends, reverse=True) and len(set(ends)) > 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stopping_patience": 0}, "stopping_patience"),
        ({"stopping_softness": 1.0}, "stopping_softness must be below 1"),
        ({"stopping_softness": -0.1}, "stopping_softness"),
        ({"stopping_softness": 0.1, "stopping_rule": "predicted"}, "stopping_rule 'predicted' has not"),
    ],
)
def test_what_has_no_meaning_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        stopping(**settings)


def test_a_pace_without_the_criterion_is_told_to_have_no_effect() -> None:
    config = unlearning(stopping_patience=2, stopping_softness=0.1)
    assert "stopping_patience, stopping_softness: no effect without stop_on_stopping_criterion" in config.warnings()
    assert not stopping(stopping_patience=2).warnings()
