"""The loop: ends with a reason, resumes to the bit, records what it did; on the embedded digits and a small model."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hamu.errors import CheckpointError, ConfigError
from hamu.methods.names import METHOD_NAMES
from hamu.tasks.own import OwnTask
from hamu.tasks.vision import VisionTask, task_for
from hamu.training.config import TrainConfig
from hamu.training.evaluation import evaluate
from hamu.training.loop import TrainingRun
from hamu.training.records import Recorder, read_records
from hamu.training.stop import StopReason
from tests.training.small_digits import copy_of, small_model, unlearning


class Killed(RuntimeError):
    """Stands for the moment at which a process dies."""


@pytest.fixture
def task(digits_task: VisionTask) -> VisionTask:
    return digits_task


@pytest.fixture
def trained(digits_model: nn.Module) -> nn.Module:
    return digits_model


def exhaust(run: TrainingRun) -> list[dict[str, Any]]:
    return list(run)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_runs_the_same_number_of_steps_and_changes_the_model(
    method: str, task: VisionTask, trained: nn.Module
) -> None:
    settings = {"constraint_ratio": 1e-4, "continue_on_failed_feasibility": True} if method.startswith("hamu") else {}
    model = copy_of(trained)
    run = TrainingRun(TrainConfig.from_flat({"method": method, "lr": 0.01, "epochs": 1, **settings}), task, model)
    exhaust(run)
    assert run.result is not None and run.result.stop_reason is StopReason.FINISHED
    assert run.result.steps == -(-task.n_rows("retain") // 128)
    assert any(not torch.equal(new, old) for new, old in zip(model.parameters(), trained.parameters(), strict=True))


def test_hamu_q_forgets_and_keeps_retain_accuracy(task: VisionTask, trained: nn.Module) -> None:
    largest = TrainingRun(unlearning(), task, copy_of(trained)).measure_hardness()["max_constraint_ratio"]
    run = TrainingRun(unlearning(constraint_ratio=0.3 * largest, lr=0.3, epochs=2), task, copy_of(trained))
    exhaust(run)
    result = run.result
    assert result is not None
    assert result.forget_quality > 0.1, "the forget loss must rise"
    assert result.after["retain_accuracy"] > result.before["retain_accuracy"] - 0.02


def test_frozen_batchnorm_keeps_its_statistics_and_trains_its_weights(task: VisionTask, trained: nn.Module) -> None:
    model = copy_of(trained)
    exhaust(TrainingRun(unlearning(), task, model))
    assert torch.equal(model[1].running_mean, trained[1].running_mean)
    assert not torch.equal(model[1].weight, trained[1].weight)


def test_a_plain_sgd_step_is_the_predicted_change(task: VisionTask, trained: nn.Module) -> None:
    """In float64 with a short step, losses change as the Grams predict: the update reached the weights as it was meant."""
    model = copy_of(trained).double()
    images, labels = (getattr(task.batch("retain", torch.arange(256)), name) for name in ("inputs", "labels"))
    own = OwnTask((images.double(), labels), (images[:64].double(), (labels[:64] + 1) % 10), model=model)
    config = unlearning(lr=1e-5, constraint_ratio=0.05, batch_size=256, epochs=1, max_grad_norm=1e6)
    run = TrainingRun(config, own, model)
    rows = exhaust(run)
    step = next(row for row in rows if row["kind"] == "step")
    assert run.result is not None and run.result.steps == 1
    # 1e-3: the second-order part of a step of length 1e-5.
    assert run.result.forget_quality == pytest.approx(step["predicted_forget_change"], rel=1e-3)
    assert -run.result.retain_utility == pytest.approx(step["predicted_retain_change"], rel=1e-3)


def test_an_infeasible_run_stops_at_step_0_and_says_which_ratio_was_feasible(task: VisionTask, trained: nn.Module) -> None:
    model = copy_of(trained)
    run = TrainingRun(unlearning(constraint_ratio=0.99), task, model)
    rows = exhaust(run)
    result = run.result
    assert result is not None
    assert result.stop_reason is StopReason.INFEASIBLE and result.steps == 0
    assert result.message is not None and f"{result.hardness['max_constraint_ratio']:.4g}" in result.message
    assert all(torch.equal(new, old) for new, old in zip(model.parameters(), trained.parameters(), strict=True))
    assert result.after == result.before and rows[-1]["stop_reason"] == "infeasible"


@pytest.mark.parametrize("split", [{}, {"distribute_constraint_uniform": True}, {"distribute_constraint_softmax_dp": True}])
def test_the_ratio_that_an_infeasible_run_names_is_feasible(split: dict[str, bool], task: VisionTask, trained: nn.Module) -> None:
    run = TrainingRun(unlearning(constraint_ratio=0.9, **split), task, copy_of(trained))
    exhaust(run)
    assert run.result is not None and run.result.steps == 0 and run.result.message is not None
    named = float(run.result.message.split("up to ")[1].split(" ")[0])
    # 0.999: the message rounds to four digits.
    again = TrainingRun(unlearning(constraint_ratio=0.999 * named, **split), task, copy_of(trained))
    exhaust(again)
    assert again.result is not None and again.result.steps > 0


def test_a_ratio_below_the_largest_feasible_one_does_step(task: VisionTask, trained: nn.Module) -> None:
    probe = TrainingRun(unlearning(), task, copy_of(trained)).measure_hardness()
    run = TrainingRun(unlearning(constraint_ratio=0.5 * probe["max_constraint_ratio"]), task, copy_of(trained))
    exhaust(run)
    assert run.result is not None and run.result.steps > 0


@pytest.mark.parametrize("rule", ["aggregate", "feasible", "predicted"])
def test_the_criterion_stops_before_the_step_on_which_it_fires(rule: str, task: VisionTask, trained: nn.Module) -> None:
    """Random rows to forget, a ratio just below the first bound: it is met some steps later, and that step is not taken."""
    random_rows = unlearning(rho=1.0)
    task = task_for(random_rows, task.data)
    column = {"aggregate": "stopping_margin", "feasible": "feasible_margin", "predicted": "predicted_margin"}[rule]
    start = TrainingRun(unlearning(), task, copy_of(trained)).measure_hardness()["max_constraint_ratio"]
    settings: dict[str, Any] = {"constraint_ratio": 0.95 * start, "lr": 0.05, "epochs": 8, "rho": 1.0}
    settings["continue_on_failed_feasibility"] = True
    model = copy_of(trained)
    run = TrainingRun(unlearning(**settings, stop_on_stopping_criterion=True, stopping_rule=rule), task, model)
    rows = exhaust(run)
    assert run.result is not None and run.result.stop_reason is StopReason.CRITERION
    steps = [row for row in rows if row["kind"] == "step"]
    assert run.result.steps > 0 and steps[-1]["step"] == run.result.steps + 1, "the withheld step has its own number"
    assert steps[-1][column] > 0 and all(row[column] <= 0 for row in steps[:-1])

    twin = copy_of(trained)
    other = TrainingRun(unlearning(**settings), task, twin)
    for row in other:
        if row["kind"] == "step" and row["step"] == run.result.steps:
            break
    assert all(torch.equal(new, old) for new, old in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_non_finite_loss_ends_the_run_with_the_last_finite_model(task: VisionTask, trained: nn.Module) -> None:
    model = copy_of(trained)
    with torch.no_grad():
        model[5].weight.fill_(1e38)
    run = TrainingRun(TrainConfig.from_flat({"method": "ga", "lr": 1.0, "epochs": 1}), task, model)
    exhaust(run)
    assert run.result is not None and run.result.stop_reason is StopReason.NON_FINITE
    assert torch.isfinite(model[5].weight).all()


def test_a_request_ends_the_run_and_keeps_its_metrics(task: VisionTask, trained: nn.Module) -> None:
    run = TrainingRun(unlearning(epochs=5), task, copy_of(trained))
    for row in run:
        if row["step"] == 3:
            run.request_stop(StopReason.CANCELLED)
    assert run.result is not None and run.result.stop_reason is StopReason.CANCELLED
    assert run.result.steps == 3 and "test_accuracy" in run.result.after


def test_training_stops_at_its_target_and_keeps_the_best_model(task: VisionTask) -> None:
    flat = {"epochs": 20, "lr": 1e-2, "target_test_accuracy": 0.6, "add_forget_to_train": True}
    run = TrainingRun(TrainConfig.from_flat(flat), task, small_model())
    exhaust(run)
    assert run.result is not None and run.result.stop_reason is StopReason.TARGET
    assert run.result.after["test_accuracy"] >= 0.6 and run.result.epochs < 20

    best = TrainConfig.from_flat(
        {**flat, "target_test_accuracy": None, "epochs": 6, "lr": 0.05, "select_best_model_by_subset_accuracy": True}
    )
    run = TrainingRun(best, task, small_model())
    rows = [row for row in exhaust(run) if "retain_accuracy" in row and row["step"] > 0]
    assert run.result is not None
    scores = [(row["retain_accuracy"] + row["forget_accuracy"]) / 2 for row in rows]
    assert (run.result.after["retain_accuracy"] + run.result.after["forget_accuracy"]) / 2 == max(scores)
    kept = evaluate(task, run.model, batch_size=512, autocast=nullcontext())
    assert kept == run.result.after, "the model itself is the best one"


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "hamu-q", "constraint_ratio": 0.02, "lr": 0.01},
        pytest.param({"method": "scrub", "lr": 0.05}, marks=pytest.mark.slow),
        pytest.param({"method": "gru", "gru_beta": 0.6, "lr": 0.01}, marks=pytest.mark.slow),
        pytest.param(
            {"method": "gdiff", "lr": 0.01, "use_optimizer": True, "lr_scheduler_type": "cosine"}, marks=pytest.mark.slow
        ),
        pytest.param({"epochs": 2, "lr": 0.01, "select_best_model_by_subset_accuracy": True}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: settings.get("method", "training"),
)
def test_a_killed_and_resumed_run_gives_the_uninterrupted_numbers_to_the_bit(
    settings: dict[str, Any], task: VisionTask, trained: nn.Module, tmp_path: Path
) -> None:
    config = TrainConfig.from_flat(
        {"epochs": 2, "save_strategy": "steps", "save_steps": 4, "eval_steps": 0.5, "eval_strategy": "steps", **settings}
    )

    def run(folder: Path, *, die_at: int | None = None) -> tuple[TrainingRun, nn.Module]:
        model = copy_of(trained)
        recorder = Recorder(folder / "records", {"trial_id": "t"})
        run = TrainingRun(
            config, task, model, recorder=recorder, checkpoint_path=folder / "checkpoint.pt", original=copy_of(trained)
        )
        try:
            for row in run:
                if row["step"] == die_at:
                    raise Killed
        except Killed:
            pass
        return run, model

    whole, whole_model = run(tmp_path / "whole")
    run(tmp_path / "parts", die_at=7)
    resumed, resumed_model = run(tmp_path / "parts")
    assert whole.result is not None and resumed.result is not None
    for name, value in whole_model.state_dict().items():
        assert torch.equal(resumed_model.state_dict()[name], value), name
    times = {"train_s": 0, "steps_s": 0}
    assert dataclasses.asdict(resumed.result) | times == dataclasses.asdict(whole.result) | times
    columns = ["kind", "step", "retain_batch_loss", "forget_batch_loss", "retain_loss", "kappa", "stop_reason"]
    tables = [read_records(tmp_path / name / "records").select(columns).to_pylist() for name in ("whole", "parts")]
    assert str(tables[0]) == str(tables[1]), "no step is recorded twice, none is lost"


def test_a_cancelled_run_goes_on_from_where_it_was_stopped(task: VisionTask, trained: nn.Module, tmp_path: Path) -> None:
    config = unlearning(epochs=2, save_strategy="no")
    whole_model, model = copy_of(trained), copy_of(trained)
    exhaust(TrainingRun(config, task, whole_model))
    cancelled = TrainingRun(config, task, model, checkpoint_path=tmp_path / "c.pt")
    for row in cancelled:
        if row["step"] == 5:
            cancelled.request_stop(StopReason.CANCELLED)
    resumed_model = copy_of(trained)
    resumed = TrainingRun(config, task, resumed_model, checkpoint_path=tmp_path / "c.pt")
    steps = [row["step"] for row in resumed if row["kind"] == "step"]
    assert steps[0] == 6
    assert all(torch.equal(a, b) for a, b in zip(resumed_model.parameters(), whole_model.parameters(), strict=True))


def test_a_run_saved_between_a_step_and_its_evaluation_makes_it_when_it_goes_on(
    task: VisionTask, trained: nn.Module, tmp_path: Path
) -> None:
    config = unlearning(epochs=1, eval_strategy="steps", eval_steps=3, logging_strategy="steps", logging_steps=1)
    whole = [(row["kind"], row["step"], row.get("forget_loss")) for row in TrainingRun(config, task, copy_of(trained))]
    cut = TrainingRun(config, task, copy_of(trained))
    told = []
    for row in cut:
        told.append((row["kind"], row["step"], row.get("forget_loss")))
        if told[-1][:2] == ("step", 3):
            cut.save(tmp_path / "c.pt")
            break
    resumed = TrainingRun(config, task, copy_of(trained), checkpoint_path=tmp_path / "c.pt")
    first = next(iter(resumed))
    assert (first["kind"], first["step"]) == ("evaluation", 3)
    assert resumed.metrics["forget_quality"] == first["forget_quality"]
    resumed = TrainingRun(config, task, copy_of(trained), checkpoint_path=tmp_path / "c.pt")
    told += [(row["kind"], row["step"], row.get("forget_loss")) for row in resumed]
    assert told == whole


def test_a_pause_that_is_due_is_told_after_the_step_and_not_recorded(
    task: VisionTask, trained: nn.Module, tmp_path: Path
) -> None:
    recorder = Recorder(tmp_path, {"trial_id": "t"})
    run = TrainingRun(unlearning(epochs=1, logging_strategy="no", eval_strategy="no"), task, copy_of(trained), recorder=recorder)
    reports = iter(run)
    assert next(reports)["kind"] == "evaluation"
    run.pause_at(0.0)
    kinds = [(row["kind"], row["step"]) for row in reports]
    assert kinds[1:-1] == [("progress", step) for step in range(2, run.total_steps + 1)]
    assert "progress" not in read_records(tmp_path)["kind"].to_pylist()


def test_a_request_in_the_middle_of_a_step_lets_the_step_be_taken(task: VisionTask, trained: nn.Module, tmp_path: Path) -> None:
    """A signal comes when it likes: the step at hand is taken and recorded once, also after the run has gone on."""
    path, config = tmp_path / "c.pt", unlearning(epochs=1, save_strategy="no")
    run = TrainingRun(config, task, copy_of(trained), recorder=Recorder(tmp_path / "r", {"trial_id": "t"}), checkpoint_path=path)
    gradients = run.engine.gradients

    def interrupted(*parts: Any) -> None:
        gradients(*parts)
        if run.step == 4:
            run.request_stop(StopReason.CANCELLED)

    run.engine.gradients = interrupted  # type: ignore[method-assign]
    exhaust(run)
    assert run.result is not None and run.result.stop_reason is StopReason.CANCELLED and run.result.steps == 5
    exhaust(
        TrainingRun(config, task, copy_of(trained), recorder=Recorder(tmp_path / "r", {"trial_id": "t"}), checkpoint_path=path)
    )
    steps = [row["step"] for row in read_records(tmp_path / "r").to_pylist() if row["kind"] == "step"]
    assert steps == list(range(1, 12))


def test_a_request_after_the_last_step_does_not_change_the_reason(task: VisionTask, trained: nn.Module) -> None:
    run = TrainingRun(unlearning(), task, copy_of(trained))
    for _ in run:
        if run.step == run.total_steps:
            run.request_stop(StopReason.CANCELLED)
    assert run.result is not None and run.result.stop_reason is StopReason.FINISHED


def test_records_tell_the_end_and_leave_out_what_a_method_has_not(task: VisionTask, trained: nn.Module, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, {"trial_id": "t"})
    exhaust(
        TrainingRun(TrainConfig.from_flat({"method": "ft", "lr": 0.01, "epochs": 1}), task, copy_of(trained), recorder=recorder)
    )
    rows = read_records(tmp_path).to_pylist()
    assert [row["stop_reason"] for row in rows if row["stop_reason"]] == ["finished"] * 2, "the last step and its evaluation"
    steps = [row for row in rows if row["kind"] == "step"]
    assert all(row["forget_batch_loss"] is None and row["kappa"] is None for row in steps)
    assert all(row["retain_batch_loss"] > 0 for row in steps)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_low_precision_pass_takes_nearly_the_same_steps(precision: str, task: VisionTask, trained: nn.Module) -> None:
    moves = []
    for settings in ({}, {precision: True}):
        model = copy_of(trained)
        run = TrainingRun(unlearning(epochs=0.3, **settings), task, model)
        exhaust(run)
        assert run.result is not None and run.result.stop_reason is StopReason.FINISHED
        moves.append(
            torch.cat([(new - old).flatten() for new, old in zip(model.parameters(), trained.parameters(), strict=True)])
        )
    cosine = torch.cosine_similarity(moves[0], moves[1], dim=0).item()
    assert cosine > 0.95  # bf16 keeps 8 bits of each product; a wrong loss scale would change the length by 1000
    assert moves[1].norm().item() == pytest.approx(moves[0].norm().item(), rel=0.1)


def test_a_checkpoint_of_other_settings_is_refused(task: VisionTask, trained: nn.Module, tmp_path: Path) -> None:
    run = TrainingRun(unlearning(), task, copy_of(trained), checkpoint_path=tmp_path / "c.pt")
    exhaust(run)
    run.save()
    other = TrainingRun(unlearning(lr=0.02), task, copy_of(trained), checkpoint_path=tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="is of recipe"):
        exhaust(other)
    (tmp_path / "c.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        exhaust(TrainingRun(unlearning(), task, copy_of(trained), checkpoint_path=tmp_path / "c.pt"))


def test_a_constraint_that_no_gradients_could_meet_is_refused(task: VisionTask, trained: nn.Module) -> None:
    with pytest.raises(ConfigError, match="larger than radius"):
        TrainingRun(unlearning(constraint_ratio=1.5), task, copy_of(trained))


def test_accumulation_over_parts_equals_one_batch(task: VisionTask, trained: nn.Module) -> None:
    results = []
    for size, parts in ((128, 1), (32, 4)):
        model = copy_of(trained)
        exhaust(TrainingRun(unlearning(batch_size=size, gradient_accumulation_steps=parts), task, model))
        results.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    # 1e-5: float32 sums of the same losses in another order, over eleven steps.
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
