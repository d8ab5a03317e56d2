"""One run from its first step to its end: `TrainingRun` is the loop that every entry shares (CLI, sweep, `hamu.unlearn`).

run = TrainingRun(config, task, model, original=original)
for report in run:      # one dict per recorded step or evaluation
    ...
run.result
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hamu.errors import CheckpointError
from hamu.methods.base import Method, MethodSettings
from hamu.methods.catalog import find_method
from hamu.methods.combine import StepRules
from hamu.methods.core import descend_retain
from hamu.methods.hardness import Hardness
from hamu.methods.objectives import cross_entropy
from hamu.tasks.base import Task
from hamu.training.batches import BatchPlan
from hamu.training.checkpoints import load_checkpoint, save_checkpoint
from hamu.training.config import TrainConfig, check_constraint
from hamu.training.engine import PairedEngine, StepReport
from hamu.training.evaluation import evaluate
from hamu.training.outcome import RunResult, hardness_columns, step_columns
from hamu.training.records import Recorder
from hamu.training.schedule import lr_factor, make_optimizer
from hamu.training.stop import StopReason

logger = logging.getLogger(__name__)

TRAINING = Method(
    name="none",
    summary="plain training",
    source="none: cross-entropy",
    rule=descend_retain,
    retain=lambda settings: cross_entropy,
    forget=None,
)
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingRun:
    """Train or unlearn a model in place, step by step.

    Args:
        config: a checked configuration; `unlearning_method` none trains on the split "retain", or with `add_forget_to_train`
            on the split "train".
        task: data, batches and scores.
        model: changed in place; on the task's device.
        original: frozen original model, for methods that need one; default: a copy of `model` as it is now.
        recorder: gets one row per recorded step and per evaluation.
        checkpoint_path: where to save, by `save_strategy`; a file that is there already is resumed from.

    Raises:
        ConfigError: the constraint is larger than any clipped gradients could meet.
        CheckpointError: the file at `checkpoint_path` is broken or of another run.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        model: nn.Module,
        *,
        original: nn.Module | None = None,
        recorder: Recorder | None = None,
        checkpoint_path: Path | None = None,
    ) -> None:
        self.config, self.task, self.model = config, task, model
        self.method = find_method(config.method_name) if config.is_unlearning else TRAINING
        if self.method.needs_original:
            original = (copy.deepcopy(model) if original is None else original).eval().requires_grad_(False)
        self._recorder, self._checkpoint_path = recorder, checkpoint_path
        self.engine = PairedEngine(
            task,
            model,
            self.method,
            settings=MethodSettings(**{name: getattr(config.method, name) for name in MethodSettings.__dataclass_fields__}),
            original=original,
            freeze_batchnorm=config.freeze_batchnorm,
            autocast=PRECISIONS[config.training.precision],
            compile_model=not config.training.no_torch_compile and next(model.parameters()).is_cuda,
        )
        check_constraint(config, self.engine.layout.n_blocks)
        self._train_split = "retain" if config.is_unlearning or not config.data.add_forget_to_train else "train"
        self.plan = BatchPlan(
            n_retain=task.n_rows(self._train_split),
            n_forget=task.n_rows("forget"),
            rows_per_step=config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps,
            seed=config.shuffle_seed if config.data.shuffle_dataset else None,
        )
        steps_per_epoch = self.plan.steps_per_epoch
        self.total_steps = max(1, round(config.training.num_train_epochs * steps_per_epoch))
        self._every = {kind: config.logging.every(kind, steps_per_epoch) for kind in ("logging", "eval", "save")}
        self.optimizer = make_optimizer(config, self.engine.params)
        self.step = 0
        self.train_s = 0.0
        self.result: RunResult | None = None
        self._requested: StopReason | None = None
        self._stop: StopReason | None = None
        self._message: str | None = None
        self._before: dict[str, float] = {}
        self._after: dict[str, float] = {}
        self._hardness: dict[str, float] = {}
        self._best: dict[str, Any] = {}
        self._evaluated_at = -1
        self._started = time.perf_counter()

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.config.lr * lr_factor(self.config.training.lr_scheduler_type, self.step, self.total_steps)

    def request_stop(self, reason: StopReason) -> None:
        """Ask the run to end before its next step (a signal, a user); the model and the metrics are kept.

        May come at any moment, in the middle of a step too: it is obeyed between steps. A run that is ending already keeps its
        own reason.
        """
        self._requested = reason

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Run to the end, one report per recorded step or evaluation; `result` is set when the iteration is over."""
        if self._checkpoint_path is not None and self._checkpoint_path.exists():
            self._resume(load_checkpoint(self._checkpoint_path))
        elif self._recorder is not None:
            self._recorder.truncate(0)
        if not self._before:
            self._before = self._evaluate()
            yield self._record("evaluation", self._before)
        while self.step < self.total_steps and self._stop is None:
            if self._requested is not None:
                self._stop = self._requested
                break
            started = time.perf_counter()
            self.engine.set_training_mode()
            report = self._take_step()
            self.train_s += time.perf_counter() - started
            if self._is_due("logging") or self._stop is not None or self.step == 1:
                # A step that was withheld has its own number, one more than the last one that was applied.
                withheld: dict[str, Any] = {"step": self.step + 1} if self._stop is not None else {}
                yield self._record("step", step_columns(report, self.method) | withheld)
            if self._is_due("eval") and self._stop is None:
                metrics = self._evaluate()
                self._keep_best(metrics)
                self._check_metrics(metrics)
                yield self._record("evaluation", metrics)
            if self._is_due("save") and self.step < self.total_steps and self._stop is None:
                self.save()
        if self._stop is StopReason.CANCELLED:
            self.save()
        yield from self._finish()

    def _take_step(self) -> StepReport:
        """One step of the method: gradients, Grams, stopping, weights, optimizer."""
        retain_parts, forget_parts = self._batches()
        lr = self.lr
        self.engine.gradients(retain_parts, forget_parts)
        report = self.engine.decide(lr=lr, rules=self._rules(lr), max_grad_norm=self.config.training.max_grad_norm)
        if not self._hardness and self.method.is_constrained:
            self._note_hardness(report)
        self._check_step(report)
        if self._stop is None:
            self.engine.apply(report.decision, lr=lr, optimizer=self.optimizer)
            self.step += 1
        return report

    def measure_hardness(self) -> dict[str, float]:
        """S, the largest feasible constraint ratio and kappa at the first batches, without a step."""
        self.engine.set_training_mode()
        lr = self.lr
        self.engine.gradients(*self._batches())
        return hardness_columns(
            self.engine.decide(lr=lr, rules=self._rules(lr), max_grad_norm=self.config.training.max_grad_norm)
        )

    def save(self) -> None:
        """Write a checkpoint from which the run goes on with the numbers of an uninterrupted one."""
        if self._checkpoint_path is None:
            return
        if self._recorder is not None:
            self._recorder.flush()
        save_checkpoint(
            self._checkpoint_path,
            {
                "recipe": self.config.recipe_hash(),
                "step": self.step,
                "train_s": self.train_s,
                "wall_s": time.perf_counter() - self._started,
                "model": self.model.state_dict(),
                "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
                "average_retain": self.engine.average_retain,
                "rng": torch.get_rng_state(),
                "before": self._before,
                "after": self._after,
                "evaluated_at": self._evaluated_at,
                "hardness": self._hardness,
                "best": self._best,
                "n_parts": 0 if self._recorder is None else self._recorder.n_parts,
            },
        )

    def _resume(self, state: dict[str, Any]) -> None:
        if state.get("recipe") != self.config.recipe_hash():
            raise CheckpointError(
                f"checkpoint {str(self._checkpoint_path)!r} is of recipe {state.get('recipe')}, this run is "
                f"{self.config.recipe_hash()}; a run resumes with the settings it began with: give those, or another "
                "output folder"
            )
        self.model.load_state_dict(state["model"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        if state["average_retain"] is not None:
            self.engine.average_retain = state["average_retain"].to(self.engine.layout.device)
        torch.set_rng_state(state["rng"])
        self.step, self.train_s, self._best = state["step"], state["train_s"], state["best"]
        self._before, self._after, self._hardness = state["before"], state["after"], state["hardness"]
        self._evaluated_at = state["evaluated_at"]
        self._started = time.perf_counter() - state["wall_s"]
        if self._recorder is not None:
            self._recorder.truncate(state["n_parts"])
        logger.info("resumed at step %d of %d", self.step, self.total_steps)

    def _finish(self) -> Iterator[dict[str, Any]]:
        if self._evaluated_at != self.step:
            metrics = self._evaluate()
            self._keep_best(metrics)
            if self._stop is None:
                self._check_metrics(metrics)
            yield self._record("evaluation", metrics)
        if self._best:
            self.model.load_state_dict(self._best["model"])
            self._after = self._best["metrics"]
        reason = self._stop or StopReason.FINISHED
        self.result = RunResult(
            stop_reason=reason,
            steps=self.step,
            epochs=self.step / self.plan.steps_per_epoch,
            train_s=self.train_s,
            before=self._before,
            after=self._after,
            hardness=self._hardness,
            message=self._message,
        )
        if self._recorder is not None:
            self._recorder.finish()

    def _batches(self) -> tuple[list[Any], list[Any]]:
        size, step = self.config.training.per_device_train_batch_size, self.step
        if self.method.is_paired:
            retain, forget = self.plan.retain(step), self.plan.forget(step)
        elif self.method is TRAINING:
            retain, forget = self.plan.retain(step), None
        elif self.method.forget is None:
            retain, forget = self.plan.retain_alone(step), None
        else:
            retain, forget = None, self.plan.forget_alone(step)
        splits = ((self._train_split, retain), ("forget", forget))
        parts = [[] if rows is None else [self.task.batch(split, part) for part in rows.split(size)] for split, rows in splits]
        return parts[0], parts[1]

    def _rules(self, lr: float) -> StepRules:
        # A learning-rate schedule reaches the constraint alike; the lr radius follows lr by itself.
        scale = lr / self.config.lr
        radius = self.config.radius
        return StepRules(
            constraint=self.config.constraint * scale,
            radius=None if radius is None else radius * scale,
            split=self.config.split,
            full_grad=self.config.method.full_grad,
            on_infeasible=self.config.on_infeasible,
            normalize_split=not self.config.method.no_normalize_distributed_constraint,
        )

    def _note_hardness(self, report: StepReport) -> None:
        self._hardness = hardness_columns(report)
        logger.debug(
            "hardness at the start: S %.4g, kappa %.4g, largest feasible constraint ratio %.4g, asked for %.4g",
            self._hardness["gradient_product"],
            self._hardness["kappa"],
            self._hardness["max_constraint_ratio"],
            self.config.constraint_ratio,
        )

    def _check_step(self, report: StepReport) -> None:
        """Decide whether the run ends before this step is applied."""
        decision, hardness = report.decision, report.decision.hardness
        rule = self.config.method.stopping_rule
        if decision.stop_reason == StopReason.NON_FINITE:
            self._stop = StopReason.NON_FINITE
            self._message = (
                f"stopped at step {self.step}: a gradient is not finite (retain loss {report.retain_loss:g}, forget loss "
                f"{report.forget_loss:g}); the model before this step is kept; use a learning rate below {self.lr:g}"
            )
        elif self.method.is_constrained and self.config.method.stop_on_stopping_criterion and hardness.margins[rule] > 0:
            self._stop = StopReason.CRITERION
            self._message = f"stopped at step {self.step} by the stopping criterion: " + self._criterion(rule, hardness)
        elif decision.stop_reason == StopReason.INFEASIBLE:
            self._stop = StopReason.INFEASIBLE
            self._message = f"stopped at step {self.step}, infeasible: " + self._feasible(hardness)

    def _feasible(self, hardness: Hardness) -> str:
        feasible = min(hardness.max_constraint_ratio, hardness.split_constraint_ratio)
        return (
            f"constraint ratio {self.config.constraint_ratio:.4g} was asked for, up to {feasible:.4g} would "
            f"have been feasible here (S = {hardness.gradient_product:.4g})"
        )

    def _criterion(self, rule: str, hardness: Hardness) -> str:
        if rule == "predicted":
            return f"the step would have changed the free objective the wrong way, by {hardness.margins[rule]:.4g} nats"
        bound = hardness.stopping_rhs / self.lr if rule == "aggregate" else hardness.max_constraint_ratio
        return f"constraint ratio {self.config.constraint_ratio:.4g} is above the {rule} rule's bound here, {bound:.4g}"

    def _check_metrics(self, metrics: dict[str, float]) -> None:
        settings, target = self.config.method, self.config.training.target_test_accuracy
        if target is not None and metrics.get("test_accuracy", 0.0) >= target:
            self._stop = StopReason.TARGET
            self._message = f"test accuracy {metrics['test_accuracy']:.4f} reached the target {target:g} at step {self.step}"
            self._best = {}  # the model that reached the target is the one to keep
        for name in ("retain_loss", "forget_loss") if settings.stop_on_loss_thresholds else ():
            threshold = getattr(settings, f"{name}_stop_threshold")
            if threshold is not None and metrics[name] > threshold:
                self._stop = StopReason.TARGET
                self._message = f"{name} {metrics[name]:.4f} passed its threshold {threshold:g} at step {self.step}"

    def _evaluate(self) -> dict[str, float]:
        started = time.perf_counter()
        batch_size = self.config.training.per_device_eval_batch_size
        metrics = evaluate(self.task, self.model, batch_size=batch_size, autocast=self.engine.autocast())
        self.train_s += time.perf_counter() - started
        self._after, self._evaluated_at = metrics, self.step
        return metrics

    def _keep_best(self, metrics: dict[str, float]) -> None:
        """Training: remember the best model by retain accuracy, or for the original by the mean of retain and forget accuracy."""
        if self.config.is_unlearning or not self.config.training.select_best_model_by_subset_accuracy:
            return
        score = metrics["retain_accuracy"]
        if self._train_split == "train":
            score = (score + metrics["forget_accuracy"]) / 2
        if not self._best or score > self._best["score"]:
            state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self._best = {"score": score, "step": self.step, "model": state, "metrics": dict(metrics)}

    def _is_due(self, kind: str) -> bool:
        every = self._every[kind]
        return every is not None and self.step > 0 and self.step % every == 0

    def _record(self, kind: str, columns: dict[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "kind": kind,
            "step": self.step,
            "epoch": self.step / self.plan.steps_per_epoch,
            "wall_s": time.perf_counter() - self._started,
            "train_s": self.train_s,
            **columns,
        }
        if "forget_loss" in columns and "retain_loss" in columns:
            row["forget_quality"] = columns["forget_loss"] - self._before["forget_loss"]
            row["retain_utility"] = self._before["retain_loss"] - columns["retain_loss"]
        if self._stop is not None or self.step >= self.total_steps:
            row["stop_reason"] = str(self._stop or StopReason.FINISHED)
        if self._recorder is not None:
            self._recorder.log(row)
            if kind == "evaluation":
                self._recorder.flush()
        return row
