"""HAMU-Q and HAMU-U give the optimum that brute force finds in two dimensions.

A linear function over a disc cut by a half plane is least on the arc or at one of the two corners where the line
meets the circle. The search below knows nothing of branches, Grams or roles: it tries angles and the two corners.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from hamu import combine_gradients
from hamu.methods.core import StepLimits, Weights, hamu_q, hamu_u
from hamu.methods.gram import Grams

EPS = np.finfo(np.float64).eps
N_CASES = 3000
N_ANGLES = 2048

SEARCH_GAP = (np.pi / N_ANGLES) ** 2 / 2
"""What the search may miss, as a share of R ||objective||: 1 - cos of half the distance between two angles."""

COLINEAR_ANGLE = 1e-6
"""Below this angle the rule may leave out the free part of the step, worth R ||objective|| sin(angle)."""

SPREAD = 0.5
"""Angles between 1 / (1 + SPREAD) and (1 + SPREAD) of the threshold may be judged either way: 1 - cos^2 of 1e-6 rad is
1e-12, rounding of the Gram moves it by up to ~1e-15, 0.1 % of it; half leaves room and loses no case that matters."""


@dataclass(frozen=True)
class Cases:
    """Independent blocks in the plane: gradients (n, 2), radius (n,), constraint (n,), feasible by design or not."""

    retain: np.ndarray
    forget: np.ndarray
    lr: np.ndarray
    radius: np.ndarray
    constraint: np.ndarray
    is_feasible: np.ndarray

    @property
    def grams(self) -> Grams:
        return Grams(*(np.einsum("nd,nd->n", a, b) for a, b in self.pairs))

    @property
    def pairs(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        return (self.retain, self.retain), (self.forget, self.forget), (self.retain, self.forget)


def length(vectors: np.ndarray) -> np.ndarray:
    return np.hypot(vectors[:, 0], vectors[:, 1])


def draw_cases(method: str, radius_kind: str, seed: int, n: int = N_CASES) -> Cases:
    """Draw angles, scales, radii and constraints, special values as often as ordinary ones."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 2 * np.pi, n)
    tilt = 10.0 ** rng.uniform(-9, -1, n) * rng.choice([-1, 1], n)
    angle = np.choose(
        rng.integers(0, 6, n),
        [
            rng.uniform(0, 2 * np.pi, n),
            rng.uniform(0, 2 * np.pi, n),
            tilt,
            np.pi + tilt,
            np.pi / 2 + tilt,
            -np.pi / 2 - tilt,
        ],
    )
    scales = 10.0 ** rng.uniform(-8, 8, (2, n))
    retain = scales[0, :, None] * np.stack([np.cos(start), np.sin(start)], axis=1)
    forget = scales[1, :, None] * np.stack([np.cos(start + angle), np.sin(start + angle)], axis=1)
    exact = rng.choice([0.0, 1.0, -1.0], n, p=[0.85, 0.1, 0.05])  # exactly colinear, exactly opposite
    forget = np.where(exact[:, None] != 0, retain * (exact * scales[1] / scales[0])[:, None], forget)
    turned = np.stack([-retain[:, 1], retain[:, 0]], axis=1)
    forget = np.where((rng.random(n) < 0.03)[:, None], turned, forget)  # exactly orthogonal

    lr = 10.0 ** rng.uniform(-8, 0, n)
    own, bound = (
        (retain, forget) if method == "hamu-q" else (forget, retain)
    )  # whose length is the lr radius; whose rise is asked
    radius = lr * length(own) if radius_kind == "lr" else 10.0 ** rng.uniform(-8, 8, n)
    share = np.choose(
        rng.integers(0, 8, n),
        [
            np.zeros(n),
            np.ones(n),  # constraint exactly at R ||g||: the one point of the disc that meets it
            np.full(n, 1e-13),
            rng.uniform(0, 1, n),
            rng.uniform(0, 1, n),
            1 - 10.0 ** rng.uniform(-9, -1, n),
            1 + 10.0 ** rng.uniform(-9, 1, n),
            10.0 ** rng.uniform(-12, 0, n),
        ],
    )
    constraint = share * radius * length(bound)
    absolute = rng.random(n) < 0.05
    constraint = np.where(absolute, 1e-13, constraint)
    share = np.where(absolute, 1e-13 / (radius * length(bound)), share)
    return Cases(retain, forget, lr, radius, constraint, is_feasible=share <= 1)


def best_by_search(objective: np.ndarray, normal: np.ndarray, radius: np.ndarray, constraint: np.ndarray) -> np.ndarray:
    """Least <objective, d> over ||d|| <= R, <normal, d> >= Q, as a share of R ||objective||; inf where none is."""
    best = np.full(len(radius), np.inf)
    for start in range(0, len(radius), 250):
        rows = slice(start, start + 250)
        unit_objective = objective[rows] / length(objective[rows])[:, None]
        unit_normal = normal[rows] / length(normal[rows])[:, None]
        level = constraint[rows] / (radius[rows] * length(normal[rows]))
        angles = np.linspace(0, 2 * np.pi, N_ANGLES, endpoint=False)
        circle = np.stack([np.cos(angles), np.sin(angles)])
        values = np.where(unit_normal @ circle >= level[:, None], unit_objective @ circle, np.inf).min(axis=1)
        off = np.sqrt(np.maximum(1 - level**2, 0.0))
        across = np.stack([-unit_normal[:, 1], unit_normal[:, 0]], axis=1)
        for side in (-1, 1):
            corner = level[:, None] * unit_normal + side * off[:, None] * across
            at_corner = np.einsum("nd,nd->n", unit_objective, corner)
            values = np.where(
                level <= 1 + 4 * EPS, np.minimum(values, at_corner), values
            )  # 1 is computed as a quotient of products
        best[rows] = values
    return best


def decide(method: str, cases: Cases, *, keep: bool = False) -> Weights:
    limits = StepLimits(lr=float("nan"), radius=cases.radius, constraint=cases.constraint, continue_infeasible=keep)
    return {"hamu-q": hamu_q, "hamu-u": hamu_u}[method](cases.grams, limits)


def sine(cases: Cases) -> np.ndarray:
    """sin of the angle by the cross product of unit vectors, good to EPS: free of the Gram's cancellation."""
    a = cases.retain / length(cases.retain)[:, None]
    b = cases.forget / length(cases.forget)[:, None]
    return np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])


GRID = [
    pytest.param(method, kind, seed, id=f"{method}-{kind}-radius")
    for seed, (method, kind) in enumerate((m, k) for m in ("hamu-q", "hamu-u") for k in ("lr", "fixed"))
]


@pytest.mark.parametrize(("method", "kind", "seed"), GRID)
def test_feasibility_is_decided_as_the_search_decides_it(method: str, kind: str, seed: int) -> None:
    cases = draw_cases(method, kind, seed)
    objective, normal = (cases.retain, cases.forget) if method == "hamu-q" else (-cases.forget, -cases.retain)
    found = np.isfinite(best_by_search(objective, normal, cases.radius, cases.constraint))
    assert np.array_equal(found, cases.is_feasible)
    weights = decide(method, cases)
    infeasible = weights.branches == "infeasible"
    assert not weights.retain[infeasible].any()  # told to stop, the rule itself gives no step
    assert not weights.forget[infeasible].any()
    assert np.array_equal(~infeasible, cases.is_feasible)
    assert infeasible.sum() > 200
    assert (~infeasible).sum() > 2000


@pytest.mark.parametrize(("method", "kind", "seed"), GRID)
def test_step_is_the_optimum_found_by_search(method: str, kind: str, seed: int) -> None:
    cases = draw_cases(method, kind, seed)
    objective, normal = (cases.retain, cases.forget) if method == "hamu-q" else (-cases.forget, -cases.retain)
    best = best_by_search(objective, normal, cases.radius, cases.constraint)
    weights = decide(method, cases)
    step = weights.retain[:, None] * cases.retain + weights.forget[:, None] * cases.forget
    ok, sin = cases.is_feasible, sine(cases)
    unit = (cases.radius * length(objective))[ok]
    value = np.einsum("nd,nd->n", objective, step)[ok] / unit
    colinear = (weights.branches == "colinear")[ok]

    # A relative error of 4 EPS in the Gram is 4 EPS / sin^2 in sin^2. The free part of a rectified step is then
    # too long by that share, worth sin of it, and its two large terms (1 / sin of their sum) round by EPS / sin.
    rounding = 16 * EPS / np.where(colinear, 1.0, np.maximum(sin[ok], COLINEAR_ANGLE / (1 + SPREAD)))
    left_out = np.where(colinear, np.minimum(sin[ok], COLINEAR_ANGLE * (1 + SPREAD)), 0.0)
    worse, better = value - best[ok], best[ok] - value
    # At 1 - level = h a corner lies sqrt(2 h) off: rounding of 4 EPS moves it by sqrt(8 EPS) or less, worth sin of it.
    corner = np.sqrt(8 * EPS) * np.where(colinear, COLINEAR_ANGLE * (1 + SPREAD), sin[ok])
    assert (worse <= left_out + rounding + corner).all(), (worse - left_out - rounding - corner).max()
    assert (better <= SEARCH_GAP + rounding + corner).all(), (better - SEARCH_GAP - rounding - corner).max()


@pytest.mark.parametrize(("method", "kind", "seed"), GRID)
def test_step_keeps_radius_and_constraint(method: str, kind: str, seed: int) -> None:
    cases = draw_cases(method, kind, seed)
    normal = cases.forget if method == "hamu-q" else -cases.retain
    weights = decide(method, cases)
    step = weights.retain[:, None] * cases.retain + weights.forget[:, None] * cases.forget
    ok, sin = cases.is_feasible, sine(cases)
    rectified = (weights.branches == "rectified")[ok]
    sin = np.where(rectified, np.maximum(sin[ok], COLINEAR_ANGLE / (1 + SPREAD)), 1.0)
    radius = cases.radius[ok]
    # As above: the free part is too long by up to 4 EPS / sin^2, and the two terms round by EPS / sin each.
    assert (length(step)[ok] <= radius * (1 + 16 * EPS / sin**2)).all()
    gained = np.einsum("nd,nd->n", normal, step)[ok]
    reach = radius * length(normal)[ok]
    # The free part is orthogonal to the normal only up to rounding of terms of size R / sin.
    assert (gained >= cases.constraint[ok] - 16 * EPS * reach / sin).all()
    # A rectified or colinear step gives the constraint and not more.
    tight = rectified | (weights.branches == "colinear")[ok]
    assert (np.abs(gained - cases.constraint[ok])[tight] <= (16 * EPS * reach / sin)[tight]).all()
    # A rectified step uses the whole radius: the same bound from below, and sqrt(1 - level^2) loses nothing more.
    assert (length(step)[ok] >= radius * (1 - 16 * EPS / sin**2))[rectified].all()


@pytest.mark.parametrize(("method", "kind", "seed"), GRID)
def test_branch_is_direct_exactly_where_plain_descent_meets_the_constraint(method: str, kind: str, seed: int) -> None:
    cases = draw_cases(method, kind, seed)
    objective, normal = (cases.retain, cases.forget) if method == "hamu-q" else (-cases.forget, -cases.retain)
    plain = -cases.radius[:, None] * objective / length(objective)[:, None]
    slack = np.einsum("nd,nd->n", normal, plain) - cases.constraint
    # On the line itself both branches give the same step, so rounding may choose: skip what lies within 16 EPS of it.
    sure = np.abs(slack) > 16 * EPS * cases.radius * length(normal)
    direct = decide(method, cases).branches == "direct"
    assert np.array_equal(direct[sure], (slack > 0)[sure])
    assert sure.sum() > 2000


@pytest.mark.parametrize(("method", "kind", "seed"), GRID)
def test_infeasible_step_told_to_continue_is_the_shortest_that_meets_the_constraint(method: str, kind: str, seed: int) -> None:
    cases = draw_cases(method, kind, seed)
    normal = cases.forget if method == "hamu-q" else -cases.retain
    weights = decide(method, cases, keep=True)
    step = weights.retain[:, None] * cases.retain + weights.forget[:, None] * cases.forget
    rows = ~cases.is_feasible
    shortest = (cases.constraint / length(normal) ** 2)[:, None] * normal
    # One product and one quotient more than the rule's: 8 EPS.
    assert (length(step - shortest)[rows] <= 8 * EPS * length(shortest)[rows]).all()
    assert (length(step)[rows] > cases.radius[rows]).all()
    kept, stopped = decide(method, cases, keep=True), decide(method, cases)
    assert np.array_equal(kept.retain[~rows], stopped.retain[~rows])  # elsewhere the choice changes nothing
    assert np.array_equal(kept.forget[~rows], stopped.forget[~rows])


@pytest.mark.parametrize(("method", "kind", "seed"), GRID)
def test_public_call_gives_the_same_step_as_the_rule(method: str, kind: str, seed: int) -> None:
    cases = draw_cases(method, kind, seed + 100, n=150)
    weights = decide(method, cases)
    expected = weights.retain[:, None] * cases.retain + weights.forget[:, None] * cases.forget
    sin = np.maximum(sine(cases), COLINEAR_ANGLE)
    for row in range(len(cases.radius)):
        step = combine_gradients(
            method,
            [torch.from_numpy(cases.retain[row])],
            [torch.from_numpy(cases.forget[row])],
            lr=float(cases.lr[row]),
            radius=None if kind == "lr" else float(cases.radius[row]),
            constraint=float(cases.constraint[row]),
        )
        if not cases.is_feasible[row]:
            assert step.stop_reason == "infeasible"
            assert step.branches == ("infeasible",)
            assert not step.updates[0].any()
            continue
        assert step.stop_reason is None
        assert step.branches == (weights.branches[row],)
        # Two Grams of the same vectors differ by rounding: the bound of the radius test above, twice.
        error = np.linalg.norm(step.updates[0].numpy() - expected[row])
        assert error <= 32 * EPS / sin[row] ** 2 * cases.radius[row] + np.sqrt(8 * EPS) * cases.radius[row]
