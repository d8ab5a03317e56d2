"""One step from one pair of gradients: `combine_gradients` for anyone's own loop, `decide_step` for the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hamu.errors import ConfigError, unknown
from hamu.methods.base import Method
from hamu.methods.catalog import find_method
from hamu.methods.core import StepLimits, Weights
from hamu.methods.gram import BlockLayout, Grams
from hamu.methods.hardness import Hardness, measure_hardness, split_constraint, step_radius
from hamu.methods.names import CONSTRAINT_SPLITS, STOPPING_RULES

STOP_INFEASIBLE = "infeasible"
STOP_NON_FINITE = "non_finite"


@dataclass(frozen=True, kw_only=True)
class StepRules:
    """How a constraint becomes a step: what `combine_gradients` takes as keywords, checked once.

    constraint: total required first-order change, nats a step, >= 0. radius: largest length of a block's step, > 0; None means
    lr * ||g_r|| per block. split: how blocks share the constraint. full_grad: the whole model is one block. on_infeasible:
    "stop" withholds an infeasible step, "continue" takes the shortest step that meets the constraint.
    normalize_split: whether the shares sum to the constraint.
    """

    constraint: float = 0.0
    radius: float | None = None
    split: str = "grad_norm"
    full_grad: bool = False
    on_infeasible: str = "stop"
    normalize_split: bool = True

    def __post_init__(self) -> None:
        """Check every rule's range."""
        if not (math.isfinite(self.constraint) and self.constraint >= 0):
            raise ConfigError(f"constraint {self.constraint} must be a finite number >= 0 (nats a step); use 0 for none")
        if self.radius is not None and not (math.isfinite(self.radius) and self.radius > 0):
            raise ConfigError(f"radius {self.radius} must be a finite number > 0, or None for lr * ||g_r||")
        if self.split not in CONSTRAINT_SPLITS:
            raise ConfigError(unknown("split", self.split, CONSTRAINT_SPLITS))
        if self.on_infeasible not in ("stop", "continue"):
            raise ConfigError(unknown("on_infeasible", self.on_infeasible, ("stop", "continue")))


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What one step does: weights and branches per block, its limits, its hardness, and why it is withheld if it is.

    table: w_r and w_f of each block, shape (n_blocks, 2), all 0 where the step is withheld. branches, constraints: one per block
    (in full-gradient mode the one value, repeated). stop_reason: None, "infeasible" or "non_finite".
    """

    table: np.ndarray
    branches: tuple[str, ...]
    constraints: tuple[float, ...]
    hardness: Hardness
    stop_reason: str | None


@dataclass(frozen=True, kw_only=True)
class Step:
    """The result of `combine_gradients`.

    updates: weight changes, one per block, to be added to the weights (zeros where the step is withheld). branches: one per
    block, of {"direct", "rectified", "colinear", "infeasible", "zero_forget_grad", "combined"}. constraints: Q_b per block, nats
    (in full-gradient mode the one branch and the one constraint of the whole model, repeated: do not sum them).
    The floats are over all blocks: kappa; stopping_rhs and stopping_margin of the published criterion (it fires where the margin
    is positive, which never withholds updates); stopping_margins by rule; max_constraint_ratio (nan without lr);
    predicted_*_change of the losses to first order, nats; gradient_product S. stop_reason: None, "infeasible" or "non_finite"
    (every branch then reads "infeasible").
    """

    updates: list[Tensor]
    branches: tuple[str, ...]
    constraints: tuple[float, ...]
    kappa: float
    gradient_product: float
    stopping_rhs: float
    stopping_margin: float
    stopping_margins: dict[str, float]
    max_constraint_ratio: float
    predicted_retain_change: float
    predicted_forget_change: float
    stop_reason: str | None


def decide_step(
    method: Method, grams: Grams, *, lr: float | None, rules: StepRules, clip: tuple[float, float] = (1.0, 1.0)
) -> Decision:
    """Turn the Grams of a gradient pair into weights: the whole of a method's step but for the linear combination.

    Args:
        method: whose rule decides.
        grams: per block, of the gradients as they are.
        clip: factors that clip g_r and g_f; the rule sees the clipped Grams, and the weights are those of unclipped gradients.
        lr: learning rate, > 0; None where a radius is given and the method needs none.
        rules: constraint, radius and how to treat them.

    Raises:
        ConfigError: the method needs a learning rate and has none.
    """
    if lr is None and (rules.radius is None or not method.is_constrained):
        raise ConfigError(
            f"lr None: method {method.name!r} needs a learning rate > 0; give lr, or for hamu-q and hamu-u a radius"
        )
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        raise ConfigError(f"lr {lr} must be a finite number > 0; give a positive learning rate")
    n_blocks, is_one = len(grams.cross), rules.full_grad or method.one_block
    if not grams.is_finite:
        return _withheld(n_blocks, STOP_NON_FINITE, constraint=float("nan"), n_ratios=1 if is_one else n_blocks)
    if clip != (1.0, 1.0):
        grams = grams.scaled(*clip)
    blocks = grams.total() if is_one else grams
    # Limits belong to the pair that the rule reads: HAMU-U's radius and split are those of (-g_f, -g_r).
    roles = blocks.swapped() if method.swaps_roles else blocks
    limits = StepLimits(
        lr=float("nan") if lr is None else lr,
        radius=step_radius(roles, lr or 0.0, rules.radius),
        constraint=split_constraint(
            roles, rules.constraint if method.is_constrained else 0.0, rules.split, normalize=rules.normalize_split
        ),
        continue_infeasible=rules.on_infeasible == "continue",
    )
    if limits.continue_infeasible and not np.isfinite(limits.constraint).all():
        # Raw softmax shares can overflow.
        return _withheld(n_blocks, STOP_INFEASIBLE, constraint=float("inf"), n_ratios=len(blocks.cross))
    weights = method.rule(blocks, limits)
    is_withheld = not limits.continue_infeasible and bool((weights.branches == "infeasible").any())
    if is_withheld:
        weights = Weights(retain=weights.retain * 0, forget=weights.forget * 0, branches=weights.branches)
    hardness = measure_hardness(blocks, limits, weights, swaps_roles=method.swaps_roles)
    repeat = n_blocks // len(blocks.cross)
    return Decision(
        table=np.tile(weights.table * clip, (repeat, 1)) if repeat > 1 else weights.table * clip,
        branches=tuple(weights.branches.tolist()) * repeat,
        constraints=tuple(limits.constraint.tolist()) * repeat,
        hardness=hardness,
        stop_reason=STOP_INFEASIBLE if is_withheld else None,
    )


def combine_gradients(
    method: str,
    retain_grads: Sequence[Tensor],
    forget_grads: Sequence[Tensor],
    *,
    lr: float | None = None,
    constraint: float = 0.0,
    radius: float | None = None,
    split: str = "grad_norm",
    full_grad: bool = False,
    on_infeasible: str = "stop",
    normalize_split: bool = True,
) -> Step:
    """Combine a retain and a forget gradient into one weight change, by the rule of any method.

    Args:
        method: a key of METHODS, such as "hamu-q". For `kl` and `scrub` pass the gradients of their objectives.
        retain_grads, forget_grads: raw gradients of the un-negated losses, one tensor per block, of equal shapes. They are read
            as they are: clip them first if you clip.
        lr: learning rate, > 0. None only for hamu-q and hamu-u with a radius.
        constraint: required first-order change, nats a step, >= 0: rise of the forget loss (hamu-q), fall of the retain loss
            (hamu-u). Other methods ignore it.
        radius: largest L2 length of each block's step (of the whole step with full_grad); None means lr * ||g_r|| per block
            (lr * ||g_f|| for hamu-u).
        split: "grad_norm", "softmax_dp" or "uniform".
        full_grad: treat the whole model as one block.
        on_infeasible: "stop" or "continue".
        normalize_split: False uses the raw weights of the split, as the published option of that name.

    Returns:
        Step: the updates and everything known about the step. One host read, whatever the number of blocks.

    Raises:
        ConfigError: an unknown name, a value out of range, or gradients that do not pair up.

    Source: arXiv 2606.02119 (HAMU-Q, HAMU-U, criteria); the other rules as in hamu/methods/core.py.
    """
    found = find_method(method)
    rules = StepRules(
        constraint=constraint,
        radius=radius,
        split=split,
        full_grad=full_grad,
        on_infeasible=on_infeasible,
        normalize_split=normalize_split,
    )
    retain_grads, forget_grads = list(retain_grads), list(forget_grads)
    if any(grad is None for grad in (*retain_grads, *forget_grads)):
        raise ConfigError("gradient None: one tensor per block is the rule; pass zeros for a block that has no gradient")
    if not retain_grads or [g.shape for g in retain_grads] != [g.shape for g in forget_grads]:
        raise ConfigError(
            f"{len(retain_grads)} retain and {len(forget_grads)} forget gradients: one of each per block, of equal shapes, "
            "is the rule; pass zeros for a block that has no gradient"
        )
    layout = BlockLayout(retain_grads)
    pair = layout.flatten(retain_grads, forget_grads)
    decision = decide_step(found, layout.grams(pair), lr=lr, rules=rules)
    if decision.stop_reason is None:
        updates = layout.views(layout.combine_(pair, decision.table))
    else:
        updates = layout.views(pair[0].zero_())
    hardness = decision.hardness
    return Step(
        updates=updates,
        branches=decision.branches,
        constraints=decision.constraints,
        kappa=hardness.kappa,
        gradient_product=hardness.gradient_product,
        stopping_rhs=hardness.stopping_rhs,
        stopping_margin=hardness.stopping_margin,
        stopping_margins=hardness.margins,
        max_constraint_ratio=hardness.max_constraint_ratio,
        predicted_retain_change=hardness.predicted_retain_change,
        predicted_forget_change=hardness.predicted_forget_change,
        stop_reason=decision.stop_reason,
    )


def _withheld(n_blocks: int, reason: str, *, constraint: float, n_ratios: int) -> Decision:
    nan = float("nan")
    return Decision(
        table=np.zeros((n_blocks, 2)),
        branches=("infeasible",) * n_blocks,
        constraints=(constraint,) * n_blocks,
        hardness=Hardness(
            kappa=nan,
            gradient_product=nan,
            stopping_rhs=nan,
            margins=dict.fromkeys(STOPPING_RULES, nan),
            max_constraint_ratio=nan,
            split_constraint_ratio=nan,
            predicted_retain_change=nan,
            predicted_forget_change=nan,
            block_ratios=np.full(n_ratios, nan),
        ),
        stop_reason=reason,
    )
