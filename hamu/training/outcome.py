"""What a run has to tell: its result as a trial's row, and a step's report as a record's columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hamu.methods.base import Method
from hamu.methods.core import BRANCHES
from hamu.training.engine import StepReport
from hamu.training.stop import StopReason


@dataclass(kw_only=True)
class RunResult:
    """How a run ended. Losses in nats, accuracies in [0, 1].

    total_steps: planned. train_s: seconds of steps and evaluations; steps_s: of steps alone. before, after: metrics of `evaluate`
    before the first step and at the end (of the kept model); empty for a run without evaluations. hardness: S, the largest
    feasible constraint ratio and kappa at the first step. message: what a user should know about an early end.
    """

    stop_reason: StopReason
    steps: int
    epochs: float
    train_s: float
    total_steps: int
    steps_s: float
    before: dict[str, float]
    after: dict[str, float]
    hardness: dict[str, float] = field(default_factory=dict)
    message: str | None = None

    @property
    def forget_quality(self) -> float:
        """Rise of the forget loss from the original, nats."""
        return self.after.get("forget_loss", float("nan")) - self.before.get("forget_loss", float("nan"))

    @property
    def retain_utility(self) -> float:
        """Minus the rise of the retain loss from the original, nats."""
        return self.before.get("retain_loss", float("nan")) - self.after.get("retain_loss", float("nan"))

    def row(self) -> dict[str, Any]:
        """The result as columns of trials.parquet."""
        kept = ("_loss", "_accuracy", "forget_test_loss_auc")
        original = {f"original_{name}": value for name, value in self.before.items() if name.endswith(kept)}
        return {
            "stop_reason": str(self.stop_reason),
            "message": self.message,
            "steps": self.steps,
            "total_steps": self.total_steps,
            "epochs": self.epochs,
            "train_s": self.train_s,
            "steps_s": self.steps_s,
            "forget_quality": self.forget_quality,
            "retain_utility": self.retain_utility,
            **self.after,
            **original,
            **self.hardness,
        }


def hardness_columns(report: StepReport) -> dict[str, float]:
    """S, the largest feasible constraint ratio and kappa of a step, as record columns."""
    hardness = report.decision.hardness
    return {
        "gradient_product": hardness.gradient_product,
        "max_constraint_ratio": hardness.max_constraint_ratio,
        "kappa": hardness.kappa,
    }


def step_columns(report: StepReport, method: Method) -> dict[str, Any]:
    """A step's report as record columns. What a method does not have (a role, a pair, branches) is left out.

    Batch losses and gradient norms are of the method's objectives, before clipping; branch shares are shares of blocks.
    """
    decision, hardness = report.decision, report.decision.hardness
    columns: dict[str, Any] = {}
    if method.retain is not None:
        columns |= {"retain_batch_loss": report.retain_loss, "retain_grad_norm": report.retain_grad_norm}
    if method.forget is not None:
        columns |= {"forget_batch_loss": report.forget_loss, "forget_grad_norm": report.forget_grad_norm}
    if not method.is_paired:
        return columns
    counts = {name: decision.branches.count(name) for name in BRANCHES}
    shares = {f"{name}_share": count / len(decision.branches) for name, count in counts.items() if any(counts.values())}
    return columns | {
        **hardness_columns(report),
        "stopping_rhs": hardness.stopping_rhs,
        "stopping_margin": hardness.margins["aggregate"],
        "feasible_margin": hardness.margins["feasible"],
        "predicted_margin": hardness.margins["predicted"],
        "predicted_retain_change": hardness.predicted_retain_change,
        "predicted_forget_change": hardness.predicted_forget_change,
        **shares,
    }
