"""Every combine rule, Gram in, weights out: read this file to compare the methods.

A step changes the weights of block b by d_b = w_r g_r + w_f g_f, where g_r and g_f are the gradients of the *un-negated* retain
and forget losses (for `kl` and `scrub`: of their objectives, see objectives.py). A rule reads the inner products of the pair and
returns the two weights of each block. Descent on a loss is a negative weight on its gradient, ascent a positive one.

    rule                d (lr = learning rate, R = radius, Q = constraint, kappa = <g_r, g_f>)
    ft                  -lr g_r
    ga                  +lr g_f
    gdiff, kl, scrub    -lr (g_r - g_f) / 2
    gru                 +lr (g_f - max(kappa, 0) / ||g_r||^2 g_r)
    pcgrad              -lr (g_r' - g_f') / 2, each projected off the other where kappa > 0
    hamu-q              argmin <g_r, d> subject to <g_f, d> >= Q, ||d|| <= R
    hamu-u              argmax <g_f, d> subject to <g_r, d> <= -Q, ||d|| <= R
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hamu.methods.gram import Grams

COLINEAR_SIN2 = 1e-12
"""sin^2 of 1e-6 rad: below this angle the part of g_r orthogonal to g_f is rounding noise of float32 gradients."""

ROUNDING = 1e-12
"""Relative slack of a feasibility test, so that a constraint of exactly R ||g_f|| counts as feasible."""


BRANCHES = np.array(["rectified", "direct", "colinear", "infeasible", "zero_forget_grad"], dtype=object)
"""Branches of HAMU's rules, by code; every other rule has the one branch "combined"."""


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """What bounds a step, per block.

    lr: learning rate (nan where a method does not need one). radius: R_b, largest L2 length of the weight change, shape
    (n_blocks,). constraint: Q_b, required first-order loss change in nats, shape (n_blocks,). continue_infeasible: whether an
    infeasible block takes the shortest step that meets its constraint (True) or withholds the step (False).
    """

    lr: float
    radius: np.ndarray
    constraint: np.ndarray
    continue_infeasible: bool = False


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The two weights of each block, shape (n_blocks,) each, and the branch that gave them."""

    retain: np.ndarray
    forget: np.ndarray
    branches: np.ndarray

    @property
    def table(self) -> np.ndarray:
        """Both weights, shape (n_blocks, 2)."""
        return np.stack([self.retain, self.forget], axis=1)


Rule = Callable[[Grams, StepLimits], Weights]


def _combined(grams: Grams, retain: float | np.ndarray, forget: float | np.ndarray) -> Weights:
    shape = grams.cross.shape
    return Weights(
        retain=np.broadcast_to(np.float64(retain), shape).copy(),
        forget=np.broadcast_to(np.float64(forget), shape).copy(),
        branches=np.full(shape, "combined", dtype=object),
    )


def descend_retain(grams: Grams, limits: StepLimits) -> Weights:
    """Fine-tune on retain rows: d = -lr g_r. Source: arXiv 2304.04934, baselines."""
    return _combined(grams, -limits.lr, 0.0)


def ascend_forget(grams: Grams, limits: StepLimits) -> Weights:
    """Ascend the forget loss: d = lr g_f. Source: arXiv 2304.04934, baselines."""
    return _combined(grams, 0.0, limits.lr)


def half_difference(grams: Grams, limits: StepLimits) -> Weights:
    """Descend the retain objective and ascend the forget objective alike: d = -lr (g_r - g_f) / 2.

    Source: gradient difference, arXiv 2401.06121; with the objectives of `kl` and `scrub` it is their paired form.
    """
    return _combined(grams, -limits.lr / 2, limits.lr / 2)


def gru(grams: Grams, limits: StepLimits) -> Weights:
    """Ascend the forget loss without raising the retain loss: d = lr (g_f - max(kappa, 0) / ||g_r||^2 g_r).

    The objectives conflict where kappa > 0, since the step goes along +g_f. Source: GRU, arXiv 2503.09117.
    """
    conflict = _ratio(np.maximum(grams.cross, 0.0), grams.retain)
    return _combined(grams, -limits.lr * conflict, limits.lr)


def pcgrad(grams: Grams, limits: StepLimits) -> Weights:
    """Project each objective off the other where they conflict (kappa > 0), then average: PCGrad, arXiv 2001.06782, alg. 1.

    With g_1 = g_r and g_2 = -g_f: d = -lr/2 [(1 + c/||g_r||^2) g_r - (1 + c/||g_f||^2) g_f], c = max(kappa, 0).
    """
    conflict = np.maximum(grams.cross, 0.0)
    retain = -limits.lr / 2 * (1 + _ratio(conflict, grams.retain))
    return _combined(grams, retain, limits.lr / 2 * (1 + _ratio(conflict, grams.forget)))


def hamu_q(grams: Grams, limits: StepLimits) -> Weights:
    """Lower the retain loss most among steps that raise the forget loss by at least Q: arXiv 2606.02119, HAMU-Q.

    Per block, with kappa_1 = -Q ||g_r|| / R:
      infeasible  Q > R ||g_f||: no step meets the constraint; told to continue, d = (Q / ||g_f||^2) g_f
      direct      kappa <= kappa_1: plain descent meets it already, d = -(R / ||g_r||) g_r
      rectified   else: d = (Q / ||g_f||^2) g_f - sqrt(R^2 - Q^2 / ||g_f||^2) p / ||p||, p = g_r - (kappa / ||g_f||^2) g_f
      colinear    p ~ 0: d = (Q / ||g_f||^2) g_f
      zero_forget_grad   ||g_f|| = 0 and Q > 0, told to continue: d = 0
    """
    radius, constraint = limits.radius, limits.constraint
    retain_norm, forget_norm, kappa = grams.retain_norm, grams.forget_norm, grams.cross
    sin2 = grams.sin2
    along_forget = _ratio(constraint, grams.forget)  # w_f of the shortest step that meets the constraint
    no_constraint_no_forget = (forget_norm == 0) & (constraint == 0)
    is_direct = (kappa * radius <= -constraint * retain_norm) & ((retain_norm > 0) | (constraint == 0))
    is_infeasible = (constraint > radius * forget_norm * (1 + ROUNDING)) & ~no_constraint_no_forget
    is_direct = (is_direct & ~is_infeasible) | no_constraint_no_forget
    is_colinear = ~is_direct & ~is_infeasible & ((sin2 <= COLINEAR_SIN2) | (retain_norm == 0))
    is_rectified = ~(is_direct | is_infeasible | is_colinear)

    # ||p|| = ||g_r|| sin(angle), and the free length is what the constraint leaves of the radius.
    free = np.sqrt(np.maximum(radius**2 - constraint * along_forget, 0.0))
    off_forget = np.where(is_rectified, _ratio(free, retain_norm * np.sqrt(sin2)), 0.0)
    keep = limits.continue_infeasible
    forget = np.where(is_direct | (is_infeasible & (not keep)), 0.0, along_forget)
    forget = forget + off_forget * _ratio(kappa, grams.forget)
    retain = np.where(is_direct, -_ratio(radius, retain_norm), -off_forget)
    codes = is_direct * 1 + is_colinear * 2 + is_infeasible * 3
    if keep:
        codes[is_infeasible & (forget_norm == 0)] = 4
    return Weights(retain=retain, forget=forget, branches=BRANCHES[codes])


def hamu_u(grams: Grams, limits: StepLimits) -> Weights:
    """Raise the forget loss most among steps that lower the retain loss by at least Q: arXiv 2606.02119, HAMU-U.

    HAMU-Q on the pair (-g_f, -g_r); the limits are those of that pair (R_b = lr ||g_f|| with the lr radius).
    """
    swapped = hamu_q(grams.swapped(), limits)
    return Weights(retain=-swapped.forget, forget=-swapped.retain, branches=swapped.branches)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, and 0 where the denominator is 0 (the branch tests decide what happens there)."""
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator != 0)
