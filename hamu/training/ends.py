"""When a run ends before its time, and what its user is told: pure functions of a step's report or an evaluation.

In a group all processes see the same report and the same metrics, so they all end at the same step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hamu.methods.hardness import Hardness
from hamu.training.config import TrainConfig
from hamu.training.engine import StepReport
from hamu.training.stop import StopReason


@dataclass(frozen=True)
class End:
    """Why a run ends, and in words."""

    reason: StopReason
    message: str


def is_firing(hardness: Hardness, *, config: TrainConfig, lr: float) -> bool:
    """Whether a HAMU run is to end by its stopping rule and that fires: constraint above (1 - softness) of the rule's bound.

    lr: learning rate of the step.
    """
    settings = config.method
    if not (config.is_hamu and settings.stop_on_stopping_criterion):
        return False
    margin = hardness.margins[settings.stopping_rule]
    if settings.stopping_softness:
        margin += settings.stopping_softness * _bound(settings.stopping_rule, hardness, lr=lr) * lr
    return margin > 0


def end_of_step(
    report: StepReport, *, config: TrainConfig, step: int, lr: float, fired: int = 0, product: float | None = None
) -> End | None:
    """Decide whether a run ends before a step is applied: no finite gradient, the stopping criterion, or infeasible.

    Args:
        report: of the step.
        step: steps applied so far.
        lr: learning rate of the step.
        fired: steps in a row at which the criterion fired (`is_firing`), this one included.
        product: S at the run's first pair of gradients, of which the constraint may be a share.
    """
    decision, hardness = report.decision, report.decision.hardness
    rule = config.method.stopping_rule
    if decision.stop_reason == StopReason.NON_FINITE:
        return End(
            StopReason.NON_FINITE,
            f"stopped at step {step}: a gradient is not finite (retain loss {report.retain_loss:g}, forget loss "
            f"{report.forget_loss:g}); the model before this step is kept; use a learning rate below {lr:g}",
        )
    if fired >= config.method.stopping_patience:
        said = _criterion(rule, hardness, config=config, lr=lr, product=product)
        times = f" ({fired} steps in a row)" if fired > 1 else ""
        return End(StopReason.CRITERION, f"stopped at step {step} by the stopping criterion{times}: {said}")
    if decision.stop_reason == StopReason.INFEASIBLE:
        feasible = min(hardness.max_constraint_ratio, hardness.split_constraint_ratio)
        return End(
            StopReason.INFEASIBLE,
            f"stopped at step {step}, infeasible: constraint ratio {config.ratio_words(product)} was asked for, up to "
            f"{feasible:.4g} would have been feasible here (S = {hardness.gradient_product:.4g})",
        )
    return None


def end_of_metrics(metrics: Mapping[str, float], *, config: TrainConfig, step: int) -> End | None:
    """Decide whether a run ends after an evaluation: a loss threshold was passed, or the target test accuracy reached."""
    settings, end = config.method, None
    if has_reached_target(metrics, config):
        said = f"test accuracy {metrics['test_accuracy']:.4f} reached the target {config.training.target_test_accuracy:g}"
        end = End(StopReason.TARGET, f"{said} at step {step}")
    for name in ("retain_loss", "forget_loss") if settings.stop_on_loss_thresholds else ():
        threshold = getattr(settings, f"{name}_stop_threshold")
        if threshold is not None and metrics[name] > threshold:
            end = End(StopReason.TARGET, f"{name} {metrics[name]:.4f} passed its threshold {threshold:g} at step {step}")
    return end


def has_reached_target(metrics: Mapping[str, float], config: TrainConfig) -> bool:
    """Whether the test accuracy is at the target; there may be none."""
    target = config.training.target_test_accuracy
    return target is not None and metrics.get("test_accuracy", 0.0) >= target


def _criterion(rule: str, hardness: Hardness, *, config: TrainConfig, lr: float, product: float | None) -> str:
    if rule == "predicted":
        return f"the step would have changed the free objective the wrong way, by {hardness.margins[rule]:.4g} nats"
    bound, softness = _bound(rule, hardness, lr=lr), config.method.stopping_softness
    said = f"the {rule} rule's bound here, {bound:.4g}"
    if softness:
        said = f"{1 - softness:.4g} of {said}, so {(1 - softness) * bound:.4g}"
    return f"constraint ratio {config.ratio_words(product)} is above {said}"


def _bound(rule: str, hardness: Hardness, *, lr: float) -> float:
    """The constraint ratio above which a rule that has a bound fires."""
    return hardness.stopping_rhs / lr if rule == "aggregate" else hardness.max_constraint_ratio
