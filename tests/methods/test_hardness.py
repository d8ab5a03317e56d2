"""Stopping rules and the largest feasible ratio: by their derivation, and by trying steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hamu import combine_gradients
from hamu.methods.catalog import METHODS
from hamu.methods.combine import Decision, StepRules, decide_step
from hamu.methods.gram import Grams
from hamu.methods.names import CONSTRAINT_SPLITS, HAMU_METHODS, METHOD_NAMES, STOPPING_RULES

EPS = np.finfo(np.float64).eps


def grams_of(retain: np.ndarray, forget: np.ndarray) -> Grams:
    """Grams of gradients of shape (blocks, dim)."""
    return Grams(
        retain=np.einsum("bd,bd->b", retain, retain),
        forget=np.einsum("bd,bd->b", forget, forget),
        cross=np.einsum("bd,bd->b", retain, forget),
    )


def random_grams(rng: np.random.Generator, blocks: int = 5) -> Grams:
    retain = rng.standard_normal((blocks, 3)) * 10.0 ** rng.uniform(-3, 3, (blocks, 1))
    forget = rng.standard_normal((blocks, 3)) * 10.0 ** rng.uniform(-3, 3, (blocks, 1))
    return grams_of(retain, forget)


def plane_grams(angles: np.ndarray, retain_norm: np.ndarray, forget_norm: np.ndarray) -> Grams:
    """Grams of blocks given by angle (radians) and norms, all of shape (blocks,)."""
    return Grams(retain=retain_norm**2, forget=forget_norm**2, cross=retain_norm * forget_norm * np.cos(angles))


def decide(method: str, grams: Grams, *, lr: float | None = 0.1, **rules: object) -> Decision:
    return decide_step(METHODS[method], grams, lr=lr, rules=StepRules(**rules))


def roles(method: str, grams: Grams) -> Grams:
    return grams if method == "hamu-q" else Grams(retain=grams.forget, forget=grams.retain, cross=grams.cross)


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_aggregate_rule_fires_where_the_ratio_exceeds_the_sum_of_norms_and_sines_whatever_the_lr(method: str) -> None:
    rng = np.random.default_rng(5)
    fired = 0
    for case in range(120):
        blocks = int(rng.integers(1, 6))
        angles = rng.uniform(0.05, np.pi - 0.05, blocks)
        norms = 10.0 ** rng.uniform(-2, 2, (2, blocks))
        grams = plane_grams(angles, *norms)
        bound = float((norms[0] * norms[1] * np.sin(angles)).sum())
        # 1 - cos^2 loses at most EPS / sin^2(0.05) = 400 EPS: 1e-9 on either side of the bound is far outside that.
        for ratio in (bound * (1 - 1e-9), bound * (1 + 1e-9), bound * rng.uniform(0, 2)):
            for lr in (1e-6, 1e-2, 1.0):
                decision = decide(method, grams, lr=lr, constraint=ratio * lr, split=CONSTRAINT_SPLITS[case % 3])
                assert decision.hardness.stopping_rhs == pytest.approx(lr * bound, rel=1e-12, abs=0)  # 400 EPS is 1e-13
                fires = decision.hardness.stopping_margin > 0
                assert fires == (ratio > bound)
                fired += fires
    assert 360 < fired < 900


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_aggregate_right_side_is_the_published_sum_for_any_radius(method: str) -> None:
    rng = np.random.default_rng(6)
    for _ in range(300):
        grams = random_grams(rng)
        own = roles(method, grams)
        fixed = float(10.0 ** rng.uniform(-4, 0))
        expected = (fixed * np.sqrt(own.retain * own.forget - own.cross**2) / np.sqrt(own.retain)).sum()
        hardness = decide(method, grams, radius=fixed, constraint=0.01).hardness
        assert hardness.stopping_rhs == pytest.approx(
            expected, rel=1e-9, abs=0
        )  # EPS / sin^2, and sin > 1e-3 in 1500 random blocks
        assert hardness.stopping_margin == pytest.approx(0.01 - expected, rel=1e-9, abs=1e-9 * expected)


@pytest.mark.parametrize("method", HAMU_METHODS)
@pytest.mark.parametrize("kind", ["lr", "fixed"])
def test_rectified_step_harms_the_free_loss_exactly_past_kappa_2_and_with_positive_kappa(method: str, kind: str) -> None:
    rng = np.random.default_rng(7)
    harmed = helped = negative = 0
    for _ in range(600):
        grams = plane_grams(rng.uniform(0, np.pi, 1), *10.0 ** rng.uniform(-4, 4, (2, 1)))
        own, lr = roles(method, grams), float(10.0 ** rng.uniform(-6, 0))
        radius = lr * float(own.retain_norm[0]) if kind == "lr" else float(10.0 ** rng.uniform(-6, 2))
        constraint = float(rng.uniform(0, 1)) * radius * float(own.forget_norm[0])
        decision = decide(method, grams, lr=lr, radius=None if kind == "lr" else radius, constraint=constraint)
        if decision.branches != ("rectified",):
            assert decision.hardness.margins["predicted"] <= 0 or decision.branches == ("colinear",)
            continue
        kappa = float(own.cross[0])
        kappa_2 = np.sqrt(max(float(own.retain[0] * own.forget[0] - constraint**2 * own.retain[0] / radius**2), 0.0))
        if abs(kappa - kappa_2) < 1e-9 * float(own.retain_norm[0] * own.forget_norm[0]):
            continue  # on the line itself rounding decides
        harms = decision.hardness.margins["predicted"] > 0
        assert harms == (kappa > kappa_2 and kappa > 0)
        published = kappa**2 > kappa_2**2
        assert (decision.hardness.stopping_margin > 0) == published
        assert (decision.hardness.margins["feasible"] > 0) == harms  # the sign-aware bound is exact for one block
        harmed += harms
        helped += not harms
        negative += published and not harms
    assert min(harmed, helped) > 90
    assert negative > 20  # the published criterion does fire on steps that do no harm


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_predicted_margin_is_the_change_of_the_free_loss_in_the_wrong_direction(method: str) -> None:
    rng = np.random.default_rng(8)
    for _ in range(300):
        hardness = decide(method, random_grams(rng), constraint=float(rng.uniform(0, 1)), on_infeasible="continue").hardness
        wrong = hardness.predicted_retain_change if method == "hamu-q" else -hardness.predicted_forget_change
        assert hardness.margins["predicted"] == wrong
        assert set(hardness.margins) == set(STOPPING_RULES)


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_largest_ratio_is_the_largest_that_is_feasible_and_harms_nothing(method: str) -> None:
    rng = np.random.default_rng(9)
    reasons = set()
    for _ in range(250):
        grams = plane_grams(rng.uniform(0.01, np.pi - 0.01, 1), *10.0 ** rng.uniform(-4, 4, (2, 1)))
        lr = float(10.0 ** rng.uniform(-6, 0))
        largest = decide(method, grams, lr=lr).hardness.max_constraint_ratio
        below = decide(method, grams, lr=lr, constraint=largest * lr * (1 - 1e-9))
        above = decide(method, grams, lr=lr, constraint=largest * lr * (1 + 1e-9))
        assert below.stop_reason is None
        assert below.hardness.margins["predicted"] <= 0
        assert above.stop_reason == "infeasible" or above.hardness.margins["predicted"] > 0
        reasons.add(above.stop_reason)
        assert below.hardness.margins["feasible"] < 0 < above.hardness.margins["feasible"]
    assert reasons == {None, "infeasible"}


@pytest.mark.parametrize("method", HAMU_METHODS)
@pytest.mark.parametrize("full_grad", [False, True])
def test_largest_ratio_depends_on_the_gradients_alone_with_the_lr_radius(method: str, full_grad: bool) -> None:
    rng = np.random.default_rng(10)
    for _ in range(30):
        grams = random_grams(rng)
        ratios = [
            decide(method, grams, lr=lr, constraint=constraint, split=split, full_grad=full_grad).hardness.max_constraint_ratio
            for lr in (1e-7, 3e-3, 1.0)
            for constraint in (0.0, 1e-3)
            for split in CONSTRAINT_SPLITS
        ]
        assert np.ptp(ratios) <= 8 * EPS * ratios[0]  # lr is multiplied in and divided out
        blocks = grams.total() if full_grad else grams
        sin = np.where(blocks.cross > 0, np.sqrt(blocks.sin2), 1.0)
        assert ratios[0] == pytest.approx(float((blocks.retain_norm * blocks.forget_norm * sin).sum()), rel=16 * EPS, abs=0)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_aggregate_bound_is_never_above_the_sign_aware_bound_nor_that_above_s(method: str) -> None:
    rng = np.random.default_rng(11)
    for _ in range(100):
        hardness = decide(method, random_grams(rng), lr=0.5).hardness
        assert hardness.stopping_rhs <= 0.5 * hardness.max_constraint_ratio * (1 + 8 * EPS)  # the same sums, other factors
        assert hardness.max_constraint_ratio <= hardness.gradient_product * (1 + 8 * EPS)


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_largest_ratio_is_nan_without_lr_and_the_rest_is_not(method: str) -> None:
    hardness = decide(method, random_grams(np.random.default_rng(12)), lr=None, radius=0.1, constraint=1e-3).hardness
    assert np.isnan(hardness.max_constraint_ratio)
    assert np.isfinite([hardness.stopping_rhs, hardness.kappa, *hardness.margins.values(), hardness.gradient_product]).all()


def test_margins_fire_strictly() -> None:
    """Orthogonal unit gradients, powers of two: the right side is exactly lr, a constraint of lr has a margin of 0."""
    retain, forget = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for constraint, sign in ((0.5, 0.0), (0.5 - 2**-20, -1.0), (0.5 + 2**-20, 1.0)):
        step = combine_gradients("hamu-q", [retain], [forget], lr=0.5, constraint=constraint, on_infeasible="continue")
        assert np.sign(step.stopping_margin) == sign
        assert np.sign(step.stopping_margins["feasible"]) == sign


def test_kappa_and_s_are_sums_over_blocks_for_every_method() -> None:
    grams = random_grams(np.random.default_rng(13))
    for method in METHOD_NAMES:
        hardness = decide(method, grams).hardness
        blocks = grams.total() if METHODS[method].one_block else grams
        assert hardness.kappa == pytest.approx(float(grams.cross.sum()), rel=16 * EPS, abs=0)
        assert hardness.gradient_product == pytest.approx(
            float((blocks.retain_norm * blocks.forget_norm).sum()), rel=16 * EPS, abs=0
        )
