"""Settings of the unlearning method; the fields are the flags of `python -m hamu.cli.train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hamu.errors import ConfigError
from hamu.methods.names import METHOD_NAMES, STOPPING_RULES
from hamu.training.fields import check_choice, check_range, setting, switch

NO_METHOD = "none"
DEFAULT_CONSTRAINT_RATIO = 0.5


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Which method (none: plain training), and its settings."""

    _argument_group_name: ClassVar[str] = "method"

    unlearning_method: str = setting(NO_METHOD, f"none (training), {', '.join(METHOD_NAMES)}")
    constraint_ratio: float | None = setting(
        None, f"HAMU: constraint / learning rate; default {DEFAULT_CONSTRAINT_RATIO}; this or hamu_constraint"
    )
    relative_constraint: bool = setting(
        False, "HAMU: constraint_ratio is a share of S, measured at the run's first pair of gradients"
    )
    hamu_constraint: float | None = setting(None, "HAMU: required first-order loss change a step, in nats")
    hamu_radius: float | None = setting(None, "HAMU: fixed largest L2 length of a block's step; default: lr radius")
    use_lr_radius: bool | None = switch("HAMU: radius = learning rate * norm of the block's gradient (the default)")
    continue_on_failed_feasibility: bool = setting(False, "HAMU: step on when the constraint cannot be met, not stop")
    stop_on_stopping_criterion: bool = setting(False, "HAMU: end the run when stopping_rule fires (always recorded)")
    stopping_rule: str = setting("aggregate", "HAMU: aggregate (as published), feasible (sign-aware) or predicted")
    stopping_patience: int = setting(1, "HAMU: steps in a row at which stopping_rule must fire before the run ends")
    stopping_softness: float = setting(
        0.0, "HAMU: stopping_rule fires above (1 - this) of its bound, in [0, 1); 0: at the bound (not with predicted)"
    )
    full_grad: bool = setting(False, "HAMU: the whole model as one block")
    distribute_constraint_grad_norm: bool = setting(
        False, "HAMU: split the constraint over blocks by the product of their gradient norms (the default)"
    )
    distribute_constraint_softmax_dp: bool = setting(False, "HAMU: split the constraint by exp(-kappa) of each block")
    distribute_constraint_uniform: bool = setting(False, "HAMU: split the constraint equally over blocks")
    no_normalize_distributed_constraint: bool = setting(
        False, "HAMU: use the raw shares of the split, which then do not sum to the constraint"
    )
    use_optimizer: bool = setting(False, "AdamW in place of plain SGD when unlearning (voids HAMU's guarantee)")
    freeze_batchnorm: bool | None = switch("keep BatchNorm statistics fixed; default: only when unlearning")
    stop_on_loss_thresholds: bool = setting(
        False, "end the run at an evaluation where retain or forget loss is above its threshold"
    )
    retain_loss_stop_threshold: float | None = setting(None, "utility is lost above this retain loss, in nats")
    forget_loss_stop_threshold: float | None = setting(None, "enough is forgotten above this forget loss, in nats")
    scrub_alpha: float = setting(0.001, "SCRUB: weight of KL to the original on retain rows")
    scrub_gamma: float = setting(0.99, "SCRUB: weight of cross-entropy on retain rows")
    gru_beta: float = setting(
        0.0, "GRU: share of the current gradient in the retain gradient's moving average, in [0, 1]; 0: no average"
    )

    def __post_init__(self) -> None:
        if self.unlearning_method not in (NO_METHOD, *METHOD_NAMES):
            check_choice("method", self.unlearning_method, (NO_METHOD, *METHOD_NAMES))
        check_choice("stopping_rule", self.stopping_rule, STOPPING_RULES)
        if self.constraint_ratio is not None and self.hamu_constraint is not None:
            raise ConfigError(
                f"constraint_ratio {self.constraint_ratio:g} and hamu_constraint {self.hamu_constraint:g} are both "
                "given; give one (hamu_constraint = constraint_ratio * learning_rate)"
            )
        if self.relative_constraint and self.hamu_constraint is not None:
            raise ConfigError(
                f"relative_constraint goes by constraint_ratio, a share of S; hamu_constraint {self.hamu_constraint:g} is in "
                "nats: leave one of them out"
            )
        check_range("constraint_ratio", self.constraint_ratio, low=0)
        check_range("hamu_constraint", self.hamu_constraint, low=0)
        check_range("hamu_radius", self.hamu_radius, above=0)
        check_range("stopping_patience", self.stopping_patience, low=1)
        check_range("stopping_softness", self.stopping_softness, low=0)
        if self.stopping_softness >= 1:
            raise ConfigError(f"stopping_softness must be below 1, got {self.stopping_softness:g}; at 1 every step would fire")
        if self.stopping_softness and self.stopping_rule == "predicted":
            raise ConfigError(
                f"stopping_softness {self.stopping_softness:g} is a share of a bound, which stopping_rule 'predicted' has not; "
                "use stopping_rule aggregate or feasible"
            )
        check_range("scrub_alpha", self.scrub_alpha, low=0)
        check_range("scrub_gamma", self.scrub_gamma, low=0)
        check_range("gru_beta", self.gru_beta, low=0, high=1)
        check_range("retain_loss_stop_threshold", self.retain_loss_stop_threshold, low=0)
        check_range("forget_loss_stop_threshold", self.forget_loss_stop_threshold, low=0)
        thresholds = (self.retain_loss_stop_threshold, self.forget_loss_stop_threshold)
        if self.stop_on_loss_thresholds and thresholds == (None, None):
            raise ConfigError(
                "stop_on_loss_thresholds needs a threshold; give retain_loss_stop_threshold or forget_loss_stop_threshold"
            )
        self._check_split()
        if self.use_lr_radius is False and self.hamu_radius is None:
            raise ConfigError("use_lr_radius False needs a fixed radius; give hamu_radius (1e-3 was common)")

    def _check_split(self) -> None:
        chosen = [name for name in ("grad_norm", "softmax_dp", "uniform") if getattr(self, f"distribute_constraint_{name}")]
        if len(chosen) > 1:
            flags = " and ".join(f"distribute_constraint_{name}" for name in chosen)
            raise ConfigError(f"{flags} are both given; the constraint is split in one way: give one")

    @property
    def split(self) -> str:
        """How the constraint is split over blocks: "grad_norm" (default), "softmax_dp" or "uniform"."""
        if self.distribute_constraint_softmax_dp:
            return "softmax_dp"
        return "uniform" if self.distribute_constraint_uniform else "grad_norm"

    @property
    def radius(self) -> float | None:
        """The fixed radius of a block's weight change (L2), or None for the lr radius, lr * ||g|| of the block."""
        return None if self.use_lr_radius else self.hamu_radius

    @property
    def on_infeasible(self) -> str:
        """What an infeasible constraint does: "stop" (default) or "continue"."""
        return "continue" if self.continue_on_failed_feasibility else "stop"
