"""How hard a step is: the split of the constraint over blocks, kappa, the stopping rules and the largest feasible ratio.

All of it comes from the Grams of one pair of gradients (arXiv 2606.02119). In the formulas g_r and g_f are the pair in which
HAMU-U is HAMU-Q: (g_r, g_f) for hamu-q, (-g_f, -g_r) for hamu-u.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hamu.methods.core import StepLimits, Weights
from hamu.methods.gram import Grams


@dataclass(frozen=True, kw_only=True)
class Hardness:
    """How hard one step is, over all blocks. Losses in nats.

    kappa: <g_r, g_f>. gradient_product: S, sum over blocks of ||g_r|| ||g_f||. stopping_rhs: right side of the published
    criterion. margins: by rule of STOPPING_RULES; a rule fires where its margin is positive. max_constraint_ratio: largest
    constraint ratio whose step the sign-aware bound allows, nan without lr. split_constraint_ratio: largest ratio that every
    block can meet with the split at hand, inf without a constraint. predicted_*_change: first-order change of the two losses.
    block_ratios: what each block adds to max_constraint_ratio, shape (n_blocks,); one block in full-gradient mode.
    """

    kappa: float
    gradient_product: float
    stopping_rhs: float
    margins: dict[str, float]
    max_constraint_ratio: float
    split_constraint_ratio: float
    predicted_retain_change: float
    predicted_forget_change: float
    block_ratios: np.ndarray = field(compare=False, repr=False)

    @property
    def stopping_margin(self) -> float:
        """Constraint minus right side of the published criterion, nats; it fires where this is positive."""
        return self.margins["aggregate"]


def step_radius(grams: Grams, lr: float, radius: float | None) -> np.ndarray:
    """R_b per block: the fixed radius, or with None the lr radius lr ||g_r||_b. Shape (n_blocks,)."""
    return lr * grams.retain_norm if radius is None else np.full_like(grams.retain, radius)


def split_constraint(grams: Grams, total: float, split: str, *, normalize: bool = True) -> np.ndarray:
    """Share a constraint of `total` nats among the blocks; shape (n_blocks,).

    grad_norm: in proportion to ||g_r|| ||g_f||. softmax_dp: to exp(-kappa). uniform: equally. A block whose two gradients are
    both zero gets no share, unless all are so. `normalize=False` (published `--no_normalize_distributed_constraint`) multiplies
    the total by the raw grad_norm or softmax_dp weight. Source: arXiv 2606.02119; the shift of the softmax and the zero blocks
    are ours.
    """
    if total == 0:
        return np.zeros_like(grams.cross)  # whatever the shares, which may overflow
    is_live = (grams.retain > 0) | (grams.forget > 0)
    if not is_live.any():
        is_live = ~is_live
    if split == "uniform":
        share = np.ones_like(grams.cross)
    elif split == "grad_norm":
        share = grams.retain_norm * grams.forget_norm
        if not share.any():  # every pair has a zero side: the product says nothing about where the constraint could be met
            share = np.ones_like(share)
    else:
        shift = grams.cross[is_live].min() if normalize else 0.0
        with np.errstate(over="ignore"):
            share = np.exp(-(grams.cross - shift))
    share = np.where(is_live, share, 0.0)
    if normalize or split == "uniform":
        share = share / share.sum()
    return total * share


def measure_hardness(grams: Grams, limits: StepLimits, weights: Weights, *, swaps_roles: bool) -> Hardness:
    """Compute kappa, the stopping margins, the largest feasible ratio and the predicted changes of one step.

    Args:
        grams: of (g_r, g_f), after clipping; one block in full-gradient mode.
        limits: the radius and constraint of the step, of the pair (-g_f, -g_r) with `swaps_roles`.
        weights: what the rule returned, for the predicted changes.
        swaps_roles: whether the free loss is the forget loss, which should rise (hamu-u), or the retain loss (all others).

    The published (aggregate) right side is sum R_b ||g_f|| sin(angle). It forgets that kappa must be positive for a step to
    raise the free loss, so the `feasible` bound is R_b ||g_f|| where kappa <= 0.
    """
    roles = grams.swapped() if swaps_roles else grams
    sin = np.sqrt(roles.sin2)
    reach = limits.radius * roles.forget_norm
    aggregate = float((reach * sin).sum())
    of_blocks = reach * np.where(roles.cross > 0, sin, 1.0)
    feasible = float(of_blocks.sum())
    total = float(limits.constraint.sum())
    asked = limits.constraint > 0
    with np.errstate(over="ignore"):
        headroom = float((reach[asked] / limits.constraint[asked]).min()) if asked.any() else float("inf")
    retain_change = float((weights.retain * grams.retain + weights.forget * grams.cross).sum())
    forget_change = float((weights.retain * grams.cross + weights.forget * grams.forget).sum())
    return Hardness(
        kappa=float(grams.cross.sum()),
        gradient_product=float((grams.retain_norm * grams.forget_norm).sum()),
        stopping_rhs=aggregate,
        margins={
            "aggregate": total - aggregate,
            "feasible": total - feasible,
            "predicted": -forget_change if swaps_roles else retain_change,
        },
        max_constraint_ratio=feasible / limits.lr if limits.lr > 0 else float("nan"),
        split_constraint_ratio=headroom * total / limits.lr if total > 0 else headroom,
        predicted_retain_change=retain_change,
        predicted_forget_change=forget_change,
        block_ratios=of_blocks / limits.lr if limits.lr > 0 else np.full_like(of_blocks, np.nan),
    )
