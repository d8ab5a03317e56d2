"""A run for timing: no evaluation at all, and rows that say so by what they lack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from hamu.errors import ConfigError
from hamu.tasks.vision import VisionTask
from hamu.training.loop import TrainingRun
from hamu.training.record_columns import TRIAL_SCHEMA
from hamu.training.records import Recorder, read_records
from tests.training.small_digits import copy_of, ended, unlearning

TIMED = {"eval_at_ends": False, "eval_strategy": "no"}


def test_nothing_is_evaluated_and_the_last_step_tells_the_end(
    digits_task: VisionTask, digits_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hamu.training.loop.evaluate", None)  # calling it would fail
    config = unlearning(**TIMED, constraint_ratio=1e-4, logging_strategy="no")
    run = TrainingRun(config, digits_task, copy_of(digits_model), recorder=Recorder(tmp_path, {"trial_id": "one"}))
    result = ended(run)
    rows = read_records(tmp_path).to_pylist()
    assert [row["step"] for row in rows] == [1, run.total_steps]
    assert rows[-1]["kind"] == "step" and rows[-1]["stop_reason"] == "finished"
    assert all(row["retain_loss"] is None and row["forget_quality"] is None for row in rows)
    row = result.row()
    assert not [name for name in row if name.endswith(("_accuracy", "_loss", "_auc"))]
    assert row["forget_quality"] != row["forget_quality"], "nan: null where it is written"
    assert row["steps"] == row["total_steps"] == run.total_steps
    assert 0 < row["steps_s"] == row["train_s"]


def test_steps_take_the_same_course_without_evaluations(digits_task: VisionTask, digits_model: nn.Module) -> None:
    timed, evaluated = copy_of(digits_model), copy_of(digits_model)
    ended(TrainingRun(unlearning(**TIMED), digits_task, timed))
    result = ended(TrainingRun(unlearning(), digits_task, evaluated))
    assert all((new == old).all() for new, old in zip(timed.parameters(), evaluated.parameters(), strict=True))
    assert 0 < result.steps_s < result.train_s, "evaluations count in train_s alone"
    row = result.row()
    assert row["original_forget_test_loss_auc"] == result.before["forget_test_loss_auc"]
    assert {"original_forget_test_loss_auc", "total_steps", "steps_s", "relative_constraint"} <= set(TRIAL_SCHEMA.names)


def test_it_goes_on_from_a_checkpoint(digits_task: VisionTask, digits_model: nn.Module, tmp_path: Path) -> None:
    config, models = unlearning(**TIMED), (copy_of(digits_model), copy_of(digits_model))
    ended(TrainingRun(config, digits_task, models[0]))
    first = TrainingRun(config, digits_task, copy_of(digits_model), checkpoint_path=tmp_path / "checkpoint.pt")
    for report in first:
        if report["step"] == 4:
            first.save()
            break
    result = ended(TrainingRun(config, digits_task, models[1], checkpoint_path=tmp_path / "checkpoint.pt"))
    assert result.before == result.after == {}
    assert all((new == old).all() for new, old in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eval_strategy": "epoch"}, "eval_strategy"),
        ({"target_test_accuracy": 0.5}, "target_test_accuracy"),
        ({"stop_on_loss_thresholds": True, "forget_loss_stop_threshold": 1.0}, "stop_on_loss_thresholds"),
        ({"modality": "llm", "eval_generation_rows": 2}, "eval_generation_rows"),
        ({"modality": "llm", "eval_tofu": True}, "eval_tofu"),
        ({"method": "none", "select_best_model_by_subset_accuracy": True}, "select_best_model_by_subset_accuracy"),
    ],
)
def test_what_looks_at_evaluations_is_refused(settings: dict[str, Any], words: str) -> None:
    given = {**TIMED, **settings}
    with pytest.raises(ConfigError, match=words):
        unlearning(**given)
