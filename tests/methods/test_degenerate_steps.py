"""`combine_gradients` on zero, colinear, opposite, infeasible and non-finite gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hamu import combine_gradients
from hamu.methods.names import HAMU_METHODS, METHOD_NAMES

LR = 0.25  # a power of two: products with it are exact


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


ZERO, X, Y = vector(0, 0), vector(1, 0), vector(0, 1)

# ---- hamu-q: zero gradients on a side


def test_no_forget_gradient_and_no_constraint_is_plain_descent() -> None:
    step = combine_gradients("hamu-q", [X], [ZERO], lr=LR)
    assert step.branches == ("direct",)
    assert torch.equal(step.updates[0], -LR * X)
    fixed = combine_gradients("hamu-q", [X], [ZERO], radius=0.5)
    assert torch.equal(fixed.updates[0], -0.5 * X)


@pytest.mark.parametrize("constraint", [1e-13, 1.0])
def test_no_forget_gradient_with_a_constraint_is_infeasible(constraint: float) -> None:
    stopped = combine_gradients("hamu-q", [X], [ZERO], lr=LR, constraint=constraint)
    assert (stopped.branches, stopped.stop_reason) == (("infeasible",), "infeasible")
    assert not stopped.updates[0].any()
    kept = combine_gradients("hamu-q", [X], [ZERO], lr=LR, constraint=constraint, on_infeasible="continue")
    assert (kept.branches, kept.stop_reason) == (("zero_forget_grad",), None)
    assert not kept.updates[0].any()  # no direction raises the forget loss


def test_no_retain_gradient_takes_the_shortest_step_within_a_fixed_radius() -> None:
    step = combine_gradients("hamu-q", [ZERO], [2 * Y], radius=0.5, constraint=0.5)
    assert step.stop_reason is None
    assert torch.equal(step.updates[0], 0.25 * Y)
    assert step.predicted_forget_change == 0.5
    beyond = combine_gradients("hamu-q", [ZERO], [2 * Y], radius=0.5, constraint=1.5)
    assert beyond.stop_reason == "infeasible"


def test_no_retain_gradient_leaves_no_lr_radius() -> None:
    assert combine_gradients("hamu-q", [ZERO], [Y], lr=LR, constraint=1e-13).stop_reason == "infeasible"
    step = combine_gradients("hamu-q", [ZERO], [Y], lr=LR)
    assert step.stop_reason is None
    assert not step.updates[0].any()


@pytest.mark.parametrize("method", HAMU_METHODS)
@pytest.mark.parametrize("radius", [None, 0.5])
def test_no_gradient_at_all_moves_nothing(method: str, radius: float | None) -> None:
    free = combine_gradients(method, [ZERO, ZERO], [ZERO, ZERO], lr=LR, radius=radius)
    assert free.stop_reason is None
    assert not any(update.any() for update in free.updates)
    bound = combine_gradients(method, [ZERO, ZERO], [ZERO, ZERO], lr=LR, radius=radius, constraint=0.1)
    assert bound.stop_reason == "infeasible"
    assert sum(bound.constraints) == pytest.approx(0.1, rel=1e-15, abs=0)
    kept = combine_gradients(method, [ZERO, ZERO], [ZERO, ZERO], lr=LR, radius=radius, constraint=0.1, on_infeasible="continue")
    assert not any(update.any() for update in kept.updates)


# ---- hamu-u: the same with the roles exchanged


def test_hamu_u_without_retain_gradient_and_constraint_is_plain_ascent() -> None:
    step = combine_gradients("hamu-u", [ZERO], [Y], lr=LR)
    assert step.branches == ("direct",)
    assert torch.equal(step.updates[0], LR * Y)


def test_hamu_u_without_retain_gradient_cannot_meet_a_constraint() -> None:
    assert combine_gradients("hamu-u", [ZERO], [Y], lr=LR, constraint=1e-13).stop_reason == "infeasible"


def test_hamu_u_without_forget_gradient_takes_the_shortest_step_that_lowers_the_retain_loss() -> None:
    step = combine_gradients("hamu-u", [2 * X], [ZERO], radius=0.5, constraint=0.5)
    assert torch.equal(step.updates[0], -0.25 * X)
    assert step.predicted_retain_change == -0.5
    assert combine_gradients("hamu-u", [X], [ZERO], lr=LR, constraint=1e-13).stop_reason == "infeasible"


# ---- colinear, opposite, boundary cases


def test_colinear_gradients_give_the_shortest_step_that_meets_the_constraint() -> None:
    q = combine_gradients("hamu-q", [4 * X], [2 * X], lr=LR, constraint=0.5)
    assert q.branches == ("colinear",)
    assert torch.equal(q.updates[0], 0.25 * X)
    u = combine_gradients("hamu-u", [4 * X], [2 * X], lr=LR, constraint=0.5)
    assert u.branches == ("colinear",)
    assert torch.equal(u.updates[0], -0.125 * X)


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_opposite_gradients_are_direct_up_to_the_last_feasible_constraint(method: str) -> None:
    for constraint in (0.0, 1.0, 2.0):  # lr ||g_r|| ||g_f|| = 2: both objectives want the same step
        step = combine_gradients(method, [4 * X], [-2 * X], lr=LR, constraint=constraint)
        assert step.branches == ("direct",)
        expected = -LR * 4 * X if method == "hamu-q" else LR * -2 * X
        assert torch.equal(step.updates[0], expected)
    assert combine_gradients(method, [4 * X], [-2 * X], lr=LR, constraint=2.0 + 1e-9).stop_reason == "infeasible"


def test_orthogonal_gradients_without_constraint_are_direct() -> None:
    assert combine_gradients("hamu-q", [X], [Y], lr=LR).branches == ("direct",)


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize("method", HAMU_METHODS)
def test_a_constraint_of_1e_13_is_a_constraint(method: str, scale: float) -> None:
    step = combine_gradients(method, [scale * X], [Y / scale], radius=0.5 * max(scale, 1 / scale), constraint=1e-13)
    assert step.branches == ("rectified",)
    gained = step.predicted_forget_change if method == "hamu-q" else -step.predicted_retain_change
    assert gained == pytest.approx(1e-13, rel=1e-12, abs=0)  # orthogonal: nothing cancels


@pytest.mark.parametrize("scale", [1e-30, 1e-14, 1e14])
def test_a_tiny_forget_gradient_is_not_a_zero_one(scale: float) -> None:
    """Without constraint its direction must still not be harmed, however short it is."""
    step = combine_gradients("hamu-q", [X], [scale * (X + Y)], lr=LR)
    assert step.branches == ("rectified",)
    torch.testing.assert_close(step.updates[0], LR / math.sqrt(2) * (Y - X), rtol=1e-14, atol=0)  # a dozen roundings


def test_constraint_at_the_very_edge_uses_the_whole_radius_for_it() -> None:
    step = combine_gradients("hamu-q", [X], [Y], lr=LR, constraint=LR)
    assert step.stop_reason is None
    assert torch.equal(step.updates[0], LR * Y)


@pytest.mark.parametrize("angle", [1e-9, 1e-7, math.pi - 1e-9, math.pi - 1e-7])
def test_nearly_colinear_gradients_in_float32_give_no_step_of_rounding_noise(angle: float) -> None:
    retain = torch.tensor([1.0, 0.0])
    forget = torch.tensor([math.cos(angle), math.sin(angle)])
    step = combine_gradients("hamu-q", [retain], [forget], lr=LR, constraint=0.125)
    assert step.branches == (("colinear",) if angle < 1 else ("direct",))
    assert float(step.updates[0].norm()) <= LR * (1 + 1e-6)  # float32 rounding
    assert float(step.updates[0] @ forget) >= 0.125 * (1 - 1e-6)


# ---- infeasible: stop, continue


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_one_infeasible_block_withholds_the_whole_step(method: str) -> None:
    grads = [[X, 10 * X], [Y, 10 * Y]]
    step = combine_gradients(method, *grads, lr=LR, constraint=0.8, split="uniform")  # first block: 0.4 > 0.25
    assert step.branches == ("infeasible", "rectified")
    assert step.stop_reason == "infeasible"
    assert not any(update.any() for update in step.updates)
    assert (step.predicted_retain_change, step.predicted_forget_change) == (0, 0)
    assert step.constraints == (0.4, 0.4)
    assert step.max_constraint_ratio == pytest.approx(101, rel=1e-15, abs=0)  # still told: what would have been feasible


def test_continue_takes_the_shortest_step_that_meets_the_constraint_of_the_block() -> None:
    step = combine_gradients(
        "hamu-q", [X, 10 * X], [2 * Y, 10 * Y], lr=LR, constraint=2.0, split="uniform", on_infeasible="continue"
    )
    assert step.branches == ("infeasible", "rectified")
    assert step.stop_reason is None
    assert torch.equal(step.updates[0], 0.5 * Y)  # longer than the radius of 0.25
    u = combine_gradients("hamu-u", [2 * X], [Y], lr=LR, constraint=1.0, on_infeasible="continue")
    assert torch.equal(u.updates[0], -0.5 * X)


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_positive_stopping_margins_never_withhold_updates(method: str) -> None:
    retain, forget = [vector(1, 0.1)], [vector(1, -0.05)]
    step = combine_gradients(method, retain, forget, lr=LR, constraint=0.2)
    assert min(step.stopping_margins.values()) > 0
    assert step.stopping_margin > 0
    assert step.stop_reason is None
    assert step.branches == ("rectified",)
    assert step.updates[0].any()


# ---- non-finite


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", [0, 1])
@pytest.mark.parametrize("full_grad", [False, True])
def test_non_finite_gradients_withhold_the_step_and_say_so(method: str, bad: float, role: int, full_grad: bool) -> None:
    pair = [[X.clone(), vector(1, 2, 3)], [Y.clone(), vector(3, 2, 1)]]
    pair[role][1][2] = bad
    step = combine_gradients(method, *pair, lr=LR, constraint=0.01, full_grad=full_grad, on_infeasible="continue")
    assert step.stop_reason == "non_finite"
    assert not any(update.any() for update in step.updates)
    assert [update.shape for update in step.updates] == [(2,), (3,)]
    assert not step.stopping_margin > 0  # nan: no rule fires on it
    assert len(step.branches) == 2
