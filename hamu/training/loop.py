"""One run from its first step to its end: `TrainingRun` is the loop that every entry shares (CLI, sweep, `hamu.unlearn`).

run = TrainingRun(config, task, model)
for report in run:      # one dict per recorded step or evaluation
    ...
run.result
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hamu.tasks.base import Task
from hamu.training.checkpoints import changing_state, load_changing_state
from hamu.training.config import TrainConfig, check_constraint
from hamu.training.ends import End, end_of_metrics, end_of_step, has_reached_target, is_firing
from hamu.training.engine import StepReport
from hamu.training.evaluation import SPLITS, evaluate
from hamu.training.groups import Group
from hamu.training.outcome import RunResult, hardness_columns, step_columns
from hamu.training.pairs import Wish
from hamu.training.records import Recorder
from hamu.training.run_parts import batches_of_step, make_engine, method_of, plan_batches, train_split
from hamu.training.run_state import Parts, RunState, left_as_it_is, load_run, save_run
from hamu.training.schedule import lr_factor, make_optimizer, rules_at
from hamu.training.steps import total_steps
from hamu.training.stop import StopReason

logger = logging.getLogger(__name__)

_MANY_ROWS = 2000
SAME_BITS_EVERY = 100
"""Steps after which the processes of a group compare their weights; they do so at the end too."""


_REASONS = tuple(StopReason)


class TrainingRun:
    """Train or unlearn a model in place, step by step.

    Args:
        config: a checked configuration; `unlearning_method` none trains on the split "retain", or with `add_forget_to_train`
            on the split "train".
        task: data, batches and scores.
        model: changed in place; on the task's device.
        original: frozen original model, for methods that need one; default: `model` as it is now (`Task.frozen`).
        recorder: gets one row per recorded step and per evaluation; of a group the first process has it.
        checkpoint_path: where to save, by `save_strategy`; a file that is there already is resumed from.
        group: processes that share the run. All build it alike, on a common file system, and call it in lockstep: each
            iteration, `save` and `measure_hardness` are calls of all, and all see the same reports. The first one writes.
        adopt_checkpoint: take the checkpoint of another recipe too, such as of another trial whose state this one goes on from;
            records are left as they are then.

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
        original: Callable[..., Any] | None = None,
        recorder: Recorder | None = None,
        checkpoint_path: Path | None = None,
        group: Group | None = None,
        adopt_checkpoint: bool = False,
    ) -> None:
        self.config, self.task, self.model = config, task, model
        self.group = group or Group.alone(next(model.parameters()).device)
        self.method = method_of(config)
        self._recorder, self._checkpoint_path, self._adopts = recorder, checkpoint_path, adopt_checkpoint
        self.engine = make_engine(config, task, model, self.method, original=original, group=self.group)
        check_constraint(config, self.engine.layout.n_blocks)
        self.plan = plan_batches(config, task, self.method, n_processes=self.group.size)
        steps_per_epoch = self.plan.steps_per_epoch
        self.total_steps = total_steps(config.training.num_train_epochs, steps_per_epoch)
        self._every = {kind: config.logging.every(kind, steps_per_epoch) for kind in ("logging", "eval", "save")}
        self.optimizer = make_optimizer(config, self.engine.params)
        self._state = RunState()
        self._parts = Parts(
            config=config, model=model, engine=self.engine, optimizer=self.optimizer, group=self.group, recorder=recorder
        )
        self.result: RunResult | None = None
        self._requested: StopReason | None = None
        self._pause_at: float | None = None
        self.is_pause_due = False
        """Whether the last step ended after the time of `pause_at`."""
        self._stop: StopReason | None = None
        self._message: str | None = None
        self._started = time.perf_counter()
        self._is_taken_up = False

    @property
    def step(self) -> int:
        """Steps applied so far."""
        return self._state.step

    @property
    def train_s(self) -> float:
        """Seconds of steps and evaluations so far."""
        return self._state.train_s

    @property
    def steps_s(self) -> float:
        """Seconds inside steps so far."""
        return self._state.steps_s

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.config.lr * lr_factor(self.config.training.lr_scheduler_type, self.step, self.total_steps)

    def request_stop(self, reason: StopReason) -> None:
        """Ask the run to end before its next step (a signal, a user); the model and the metrics are kept.

        May come at any moment, in the middle of a step too: it is obeyed between steps. A run that is ending already keeps its
        own reason. In a group any process may ask: the request travels with the next gradients, and that step is not applied.
        """
        self._requested = reason

    def pause_at(self, deadline: float | None) -> None:
        """Set `is_pause_due` at the first step that ends after `deadline` (of `time.monotonic`, the first process's counts)."""
        self._pause_at, self.is_pause_due = deadline, False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Run to the end, one report per recorded step or evaluation; `result` is set when the iteration is over.

        With `pause_at` a step after its deadline is reported too, and not recorded (kind "progress").
        """
        self.take_up()
        is_measured = self.config.method.relative_constraint and self.method.is_constrained
        if is_measured and not self._state.hardness:
            self._note_hardness(self.measure_hardness())
        if not self._state.before and self.config.logging.eval_at_ends:
            n_rows = sum(self.task.n_rows(split) for split in SPLITS)
            if n_rows > _MANY_ROWS:
                logger.info("evaluating %d rows before the first step; nothing is drawn meanwhile", n_rows)
            self._state.before = self._evaluate()
            yield self._record("evaluation", self._state.before)
        elif self._is_due("eval") and self._state.evaluated_at != self.step < self.total_steps:
            yield self._evaluation()  # saved between a step and its evaluation
        while self.step < self.total_steps and self._stop is None:
            if self._requested is not None and self.group.size == 1:
                self._stop = self._requested
                break
            started = time.perf_counter()
            self.engine.set_training_mode()
            report = self._take_step()
            spent = time.perf_counter() - started
            self._state.train_s += spent
            self._state.steps_s += spent
            if report.wish.stop:
                break
            self.is_pause_due = report.wish.pause
            is_end = self._stop is not None or (self.step == self.total_steps and not self.config.logging.eval_at_ends)
            if self._is_due("logging") or is_end or self.step == 1:
                # A step that was withheld has its own number, one more than the last one that was applied.
                withheld: dict[str, Any] = {"step": self.step + 1} if self._stop is not None else {}
                yield self._record("step", step_columns(report, self.method) | withheld)
            elif self.is_pause_due:
                yield {"kind": "progress", "step": self.step, "train_s": self.train_s}
            if self._is_due("eval") and self._stop is None:
                yield self._evaluation()
            if self._is_due("save") and self.step < self.total_steps and self._stop is None:
                self.save()
        if self._stop is StopReason.CANCELLED:
            self.save()
        yield from self._finish()

    def take_up(self) -> None:
        """Go on from the checkpoint, if there is one; iterating does so by itself. Twice is once.

        Raises:
            CheckpointError: it cannot be read, or is of another run.
        """
        if self._is_taken_up:
            return
        self._is_taken_up = True
        exists = self._checkpoint_path is not None and self._checkpoint_path.exists()
        if self._checkpoint_path is not None and self.group.first(exists):
            self._state, self._started = load_run(self._checkpoint_path, self._parts, adopts=self._adopts)
            logger.info("resumed at step %d of %d", self.step, self.total_steps)
        elif self._recorder is not None:
            self._recorder.truncate(0)

    def _take_step(self) -> StepReport:
        """One step of the method: gradients, Grams, stopping, weights, optimizer."""
        retain_parts, forget_parts = self.batches(self.step)
        lr, random_state = self.lr, torch.get_rng_state()
        self.engine.gradients(retain_parts, forget_parts)
        wish = Wish(
            stop=0 if self._requested is None or self.group.size == 1 else 1 + _REASONS.index(self._requested),
            pause=self._pause_at is not None and time.monotonic() > self._pause_at,
        )
        report = self.engine.decide(
            lr=lr, rules=rules_at(self.config, lr, self._product), max_grad_norm=self.config.training.max_grad_norm, wish=wish
        )
        if report.wish.stop:
            self._stop = _REASONS[report.wish.stop - 1]
            torch.set_rng_state(random_state)  # as if the step had not been begun: a resumed run begins it again
            return report
        if not self._state.hardness and self.method.is_constrained:
            self._note_hardness(hardness_columns(report))
        fires = is_firing(report.decision.hardness, config=self.config, lr=lr)
        self._state.fired = fired = self._state.fired + 1 if fires else 0
        self._end(end_of_step(report, config=self.config, step=self.step, lr=lr, fired=fired, product=self._product))
        if self._stop is None:
            self.engine.apply(report.decision, lr=lr, optimizer=self.optimizer)
            self._state.step += 1
            if self.step % SAME_BITS_EVERY == 0:
                self._check_same_bits()
        return report

    def batches(self, step: int) -> tuple[list[Any], list[Any]]:
        """This process's batches of each role in a step."""
        return batches_of_step(self.config, self.task, self.method, self.plan, self.engine.pair, step)

    def measure_hardness(self) -> dict[str, float]:
        """S, the largest feasible constraint ratio and kappa at the next pair of gradients, without a step.

        The random state, and BatchNorm's statistics where they are not frozen, are left as they are.
        """
        rules, max_norm = rules_at(self.config, self.lr), self.config.training.max_grad_norm
        with left_as_it_is(self.model):
            self.engine.set_training_mode()
            self.engine.gradients(*self.batches(self.step))
            return hardness_columns(self.engine.decide(lr=self.lr, rules=rules, max_grad_norm=max_norm))

    def save(self, path: Path | None = None) -> None:
        """Write a checkpoint from which the run goes on with the numbers of an uninterrupted one.

        path: default: the run's own; a run without one saves nothing.
        """
        path = path or self._checkpoint_path
        if path is None:
            return
        save_run(path, self._state, self._parts, started=self._started)

    def _check_same_bits(self) -> None:
        """Compare the weights and buffers of all processes.

        Raises:
            RuntimeError: they differ, on every process.
        """
        if self.group.size > 1 and not self.group.have_same_bits(list(changing_state(self.model).values())):
            raise RuntimeError(
                f"the {self.group.size} processes hold different weights after step {self.step}, so nothing of this run can be "
                "trusted; run it with gradient_pairing sequential, and report the model and the hardware"
            )

    def _finish(self) -> Iterator[dict[str, Any]]:
        if self._state.evaluated_at != self.step and self.config.logging.eval_at_ends:
            yield self._evaluation()
        if self._state.best:
            load_changing_state(self.model, self._state.best["model"])
            self._state.after = self._state.best["metrics"]
        self._check_same_bits()
        if self._stop is not StopReason.CANCELLED:
            self._state.after = self._state.after | self._extra_metrics()
        reason = self._stop or StopReason.FINISHED
        self.result = RunResult(
            stop_reason=reason,
            steps=self.step,
            total_steps=self.total_steps,
            steps_s=self.steps_s,
            epochs=self.step / self.plan.steps_per_epoch,
            train_s=self.train_s,
            before=self._state.before,
            after=self._state.after,
            hardness=self._state.hardness,
            message=self._message,
        )
        if self._recorder is not None:
            self._recorder.finish()

    @property
    def _product(self) -> float | None:
        """S at the first pair of gradients, once it is known."""
        return self._state.hardness.get("gradient_product")

    def _note_hardness(self, hardness: dict[str, float]) -> None:
        self._state.hardness = hardness
        logger.debug(
            "hardness at the start: S %.4g, kappa %.4g, largest feasible constraint ratio %.4g, asked for %s",
            self._state.hardness["gradient_product"],
            self._state.hardness["kappa"],
            self._state.hardness["max_constraint_ratio"],
            self.config.ratio_words(self._product),
        )

    def _evaluation(self) -> dict[str, Any]:
        """Evaluate, look whether that ends the run, and record it."""
        metrics = self._evaluate()
        self._keep_best(metrics)
        if self._stop is None:
            self._end_by(metrics)
        return self._record("evaluation", metrics)

    def _end_by(self, metrics: dict[str, float]) -> None:
        self._end(end_of_metrics(metrics, config=self.config, step=self.step))
        if self._stop is StopReason.TARGET and has_reached_target(metrics, self.config):
            self._state.best = {}  # the model that reached the target is the one to keep

    def _end(self, end: End | None) -> None:
        if end is not None:
            self._stop, self._message = end.reason, end.message

    def _evaluate(self) -> dict[str, float]:
        started = time.perf_counter()
        batch_size = self.config.training.per_device_eval_batch_size
        metrics = evaluate(self.task, self.model, batch_size=batch_size, autocast=self.engine.autocast(), group=self.group)
        self._state.train_s += time.perf_counter() - started
        self._state.after, self._state.evaluated_at = metrics, self.step
        return metrics

    def _extra_metrics(self) -> dict[str, float]:
        """Measure what the task has to say of the final model, beside its row scores; should that fail, the model is kept."""
        if not self.task.has_extra_metrics:
            return {}
        self.save()
        started = time.perf_counter()
        self.model.eval()
        with self.engine.autocast():
            metrics = self.task.extra_metrics(self.model)
        self._state.train_s += time.perf_counter() - started
        return metrics

    def _keep_best(self, metrics: dict[str, float]) -> None:
        """Training: remember the best model by retain accuracy, or for the original by the mean of retain and forget accuracy."""
        if self.config.is_unlearning or not self.config.training.select_best_model_by_subset_accuracy:
            return
        score = metrics["retain_accuracy"]
        if train_split(self.config) == "train":
            score = (score + metrics["forget_accuracy"]) / 2
        self._state.keep_best(self.model, metrics, score=score)

    @property
    def metrics(self) -> dict[str, float]:
        """The last evaluation, that of a checkpoint too, with forget quality and retain utility; empty before the first one."""
        return self._state.after | self._state.gains(self._state.after)

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
        if kind == "evaluation":
            row |= self._state.gains(columns)
        if self._stop is not None or self.step >= self.total_steps:
            row["stop_reason"] = str(self._stop or StopReason.FINISHED)
        if self._recorder is not None:
            self._recorder.log(row)
            if kind == "evaluation":
                self._recorder.flush()
        return row
