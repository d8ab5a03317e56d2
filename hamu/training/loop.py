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
from torch import Tensor, nn

from hamu.errors import CheckpointError
from hamu.methods.base import Method, MethodSettings
from hamu.methods.catalog import find_method
from hamu.methods.core import descend_retain
from hamu.methods.objectives import cross_entropy
from hamu.tasks.base import Task
from hamu.training.batches import BatchPlan, rows_of_roles
from hamu.training.checkpoints import changing_state, load_changing_state, load_checkpoint, save_checkpoint
from hamu.training.config import TrainConfig, check_constraint
from hamu.training.ends import End, end_of_metrics, end_of_step, has_reached_target
from hamu.training.engine import PRECISIONS, PairedEngine, StepReport
from hamu.training.evaluation import SPLITS, evaluate
from hamu.training.groups import Group
from hamu.training.outcome import RunResult, hardness_columns, step_columns
from hamu.training.pairs import FORGET, RETAIN, Wish
from hamu.training.records import Recorder
from hamu.training.schedule import lr_factor, make_optimizer, rules_at
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
        self.method = find_method(config.method_name) if config.is_unlearning else TRAINING
        if self.method.needs_original and original is None:
            original = task.frozen(model)
        self._recorder, self._checkpoint_path, self._adopts = recorder, checkpoint_path, adopt_checkpoint
        self.engine = PairedEngine(
            task,
            model,
            self.method,
            settings=MethodSettings(**{name: getattr(config.method, name) for name in MethodSettings.__dataclass_fields__}),
            original=original,
            freeze_batchnorm=config.freeze_batchnorm,
            autocast=PRECISIONS[config.training.precision],
            compile_model=task.can_compile and not config.training.no_torch_compile and next(model.parameters()).is_cuda,
            group=self.group,
        )
        check_constraint(config, self.engine.layout.n_blocks)
        self._train_split = "retain" if config.is_unlearning or not config.data.add_forget_to_train else "train"
        # A pair of processes takes the rows of one; in plain training each process does. One process alone can do the steps of
        # several, by accumulation.
        n_processes = max(self.group.size, config.run.num_workers if config.is_split else 1)
        assert self.group.size in (1, n_processes), "the group has as many processes as the configuration says"
        n_pairs = n_processes if self.method is TRAINING else max(1, n_processes // 2)
        self.plan = BatchPlan(
            n_retain=task.n_rows(self._train_split),
            n_forget=task.n_rows("forget"),
            rows_per_step=config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps * n_pairs,
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
        self._pause_at: float | None = None
        self.is_pause_due = False
        """Whether the last step ended after the time of `pause_at`."""
        self._stop: StopReason | None = None
        self._message: str | None = None
        self._before: dict[str, float] = {}
        self._after: dict[str, float] = {}
        self._hardness: dict[str, float] = {}
        self._best: dict[str, Any] = {}
        self._evaluated_at = -1
        self._started = time.perf_counter()
        self._is_taken_up = False

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
        if not self._before:
            n_rows = sum(self.task.n_rows(split) for split in SPLITS)
            if n_rows > _MANY_ROWS:
                logger.info("evaluating %d rows before the first step; nothing is drawn meanwhile", n_rows)
            self._before = self._evaluate()
            yield self._record("evaluation", self._before)
        elif self._is_due("eval") and self._evaluated_at != self.step < self.total_steps:
            yield self._evaluation()  # saved between a step and its evaluation
        while self.step < self.total_steps and self._stop is None:
            if self._requested is not None and self.group.size == 1:
                self._stop = self._requested
                break
            started = time.perf_counter()
            self.engine.set_training_mode()
            report = self._take_step()
            self.train_s += time.perf_counter() - started
            if report.wish.stop:
                break
            self.is_pause_due = report.wish.pause
            if self._is_due("logging") or self._stop is not None or self.step == 1:
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
            self._resume(load_checkpoint(self._checkpoint_path))
        elif self._recorder is not None:
            self._recorder.truncate(0)

    def _take_step(self) -> StepReport:
        """One step of the method: gradients, Grams, stopping, weights, optimizer."""
        retain_parts, forget_parts = self._batches()
        lr, random_state = self.lr, torch.get_rng_state()
        self.engine.gradients(retain_parts, forget_parts)
        wish = Wish(
            stop=0 if self._requested is None or self.group.size == 1 else 1 + _REASONS.index(self._requested),
            pause=self._pause_at is not None and time.monotonic() > self._pause_at,
        )
        report = self.engine.decide(
            lr=lr, rules=rules_at(self.config, lr), max_grad_norm=self.config.training.max_grad_norm, wish=wish
        )
        if report.wish.stop:
            self._stop = _REASONS[report.wish.stop - 1]
            torch.set_rng_state(random_state)  # as if the step had not been begun: a resumed run begins it again
            return report
        if not self._hardness and self.method.is_constrained:
            self._note_hardness(report)
        self._end(end_of_step(report, config=self.config, method=self.method, step=self.step, lr=lr))
        if self._stop is None:
            self.engine.apply(report.decision, lr=lr, optimizer=self.optimizer)
            self.step += 1
            if self.step % SAME_BITS_EVERY == 0:
                self._check_same_bits()
        return report

    def measure_hardness(self) -> dict[str, float]:
        """S, the largest feasible constraint ratio and kappa at the first batches, without a step.

        The random state, and BatchNorm's statistics where they are not frozen, are left as they are.
        """
        self.engine.set_training_mode()
        lr = self.lr
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with torch.random.fork_rng():
            self.engine.gradients(*self._batches())
            rules, max_norm = rules_at(self.config, lr), self.config.training.max_grad_norm
            hardness = hardness_columns(self.engine.decide(lr=lr, rules=rules, max_grad_norm=max_norm))
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
        return hardness

    def save(self, path: Path | None = None) -> None:
        """Write a checkpoint from which the run goes on with the numbers of an uninterrupted one.

        path: default: the run's own; a run without one saves nothing.
        """
        path = path or self._checkpoint_path
        if path is None:
            return
        average_retain, rng = self.engine.average_retain, self.group.gather_numbers(self._random_state())
        if not self.group.is_first:
            return
        if self._recorder is not None:
            self._recorder.flush()
        save_checkpoint(
            path,
            {
                "recipe": self.config.recipe_hash(),
                "step": self.step,
                "train_s": self.train_s,
                "wall_s": time.perf_counter() - self._started,
                "model": changing_state(self.model),
                "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
                "average_retain": average_retain,
                "rng": rng.cpu(),
                "before": self._before,
                "after": self._after,
                "evaluated_at": self._evaluated_at,
                "hardness": self._hardness,
                "best": self._best,
                "n_parts": 0 if self._recorder is None else self._recorder.n_parts,
            },
        )

    def _random_state(self) -> Tensor:
        return torch.get_rng_state().to(self.group.device)

    def _resume(self, state: dict[str, Any]) -> None:
        if state.get("recipe") != self.config.recipe_hash() and not self._adopts:
            raise CheckpointError(
                f"checkpoint {str(self._checkpoint_path)!r} is of recipe {state.get('recipe')}, this run is "
                f"{self.config.recipe_hash()}; a run resumes with the settings it began with: give those, or another "
                "output folder"
            )
        load_changing_state(self.model, state["model"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.engine.average_retain = state["average_retain"]
        torch.set_rng_state(
            state["rng"].view(-1, state["rng"].shape[-1])[self.group.rank].clone()
        )  # a view with an offset ends the process in torch
        self.step, self.train_s, self._best = state["step"], state["train_s"], state["best"]
        self._before, self._after, self._hardness = state["before"], state["after"], state["hardness"]
        self._evaluated_at = state["evaluated_at"]
        self._started = time.perf_counter() - state["wall_s"]
        if self._recorder is not None and not self._adopts:
            self._recorder.truncate(state["n_parts"])
        logger.info("resumed at step %d of %d", self.step, self.total_steps)

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
        if self._evaluated_at != self.step:
            yield self._evaluation()
        if self._best:
            load_changing_state(self.model, self._best["model"])
            self._after = self._best["metrics"]
        self._check_same_bits()
        if self._stop is not StopReason.CANCELLED:
            self._after = self._after | self._extra_metrics()
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
        """This process's batches of each role in the next step; none where the role is another's, or its rows do not go round."""
        size = self.config.training.per_device_train_batch_size
        rows_of_role = rows_of_roles(self.plan, self.step, self.method, is_training=self.method is TRAINING)
        parts: list[list[Any]] = []
        for role, split in ((RETAIN, self._train_split), (FORGET, "forget")):
            rows = rows_of_role[role]
            share, n_shares = self.engine.pair.share(role)
            own = [] if rows is None or share is None else self.task.parts(split, rows.tensor_split(n_shares)[share], size)
            parts.append([self.task.batch(split, part) for part in own if len(part)])
        return parts[0], parts[1]

    def _note_hardness(self, report: StepReport) -> None:
        self._hardness = hardness_columns(report)
        logger.debug(
            "hardness at the start: S %.4g, kappa %.4g, largest feasible constraint ratio %.4g, asked for %.4g",
            self._hardness["gradient_product"],
            self._hardness["kappa"],
            self._hardness["max_constraint_ratio"],
            self.config.constraint_ratio,
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
            self._best = {}  # the model that reached the target is the one to keep

    def _end(self, end: End | None) -> None:
        if end is not None:
            self._stop, self._message = end.reason, end.message

    def _evaluate(self) -> dict[str, float]:
        started = time.perf_counter()
        batch_size = self.config.training.per_device_eval_batch_size
        metrics = evaluate(self.task, self.model, batch_size=batch_size, autocast=self.engine.autocast(), group=self.group)
        self.train_s += time.perf_counter() - started
        self._after, self._evaluated_at = metrics, self.step
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
        self.train_s += time.perf_counter() - started
        return metrics

    def _keep_best(self, metrics: dict[str, float]) -> None:
        """Training: remember the best model by retain accuracy, or for the original by the mean of retain and forget accuracy."""
        if self.config.is_unlearning or not self.config.training.select_best_model_by_subset_accuracy:
            return
        score = metrics["retain_accuracy"]
        if self._train_split == "train":
            score = (score + metrics["forget_accuracy"]) / 2
        if not self._best or score > self._best["score"]:
            state = {name: value.detach().clone() for name, value in changing_state(self.model).items()}
            self._best = {"score": score, "step": self.step, "model": state, "metrics": dict(metrics)}

    @property
    def metrics(self) -> dict[str, float]:
        """The last evaluation, that of a checkpoint too, with forget quality and retain utility; empty before the first one."""
        return self._after | self._gains(self._after)

    def _gains(self, metrics: dict[str, float]) -> dict[str, float]:
        if not {"forget_loss", "retain_loss"} <= metrics.keys():
            return {}
        return {
            "forget_quality": metrics["forget_loss"] - self._before["forget_loss"],
            "retain_utility": self._before["retain_loss"] - metrics["retain_loss"],
        }

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
            row |= self._gains(columns)
        if self._stop is not None or self.step >= self.total_steps:
            row["stop_reason"] = str(self._stop or StopReason.FINISHED)
        if self._recorder is not None:
            self._recorder.log(row)
            if kind == "evaluation":
                self._recorder.flush()
        return row
