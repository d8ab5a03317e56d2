"""Splits of the constraint, stopping rules and the largest feasible ratio: by their derivation, and by trying steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hamu import combine_gradients
from hamu.methods.catalog import METHODS
from hamu.methods.combine import Decision, StepRules, decide_step
from hamu.methods.gram import Grams
from hamu.methods.hardness import SPLITS, STOPPING_RULES, split_constraint, step_radius
from hamu.methods.names import HAMU_METHODS, METHOD_NAMES

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


# ---- splits


@pytest.mark.parametrize("split", SPLITS)
def test_shares_are_not_negative_and_sum_to_the_constraint(split: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        total = 10.0 ** rng.uniform(-13, 3)
        shares = split_constraint(random_grams(rng), total, split)
        assert (shares >= 0).all()
        assert shares.sum() == pytest.approx(total, rel=16 * EPS, abs=0)  # five roundings and a quotient


def test_shares_follow_their_formulas() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        grams = random_grams(rng)
        product = grams.retain_norm * grams.forget_norm
        small = Grams(grams.retain, grams.forget, grams.cross / np.abs(grams.cross).max())  # so that plain exp cannot overflow
        for split, weight, pair in (
            ("grad_norm", product, grams),
            ("softmax_dp", np.exp(-small.cross), small),
            ("uniform", np.ones(5), grams),
        ):
            # A handful of roundings; exp(-x) and exp(-(x - m)) / exp(m) differ by a few EPS at |x| <= 1.
            assert split_constraint(pair, 2.0, split) == pytest.approx(2 * weight / weight.sum(), rel=32 * EPS, abs=0)


@pytest.mark.parametrize("cross", [[1e6, 1e6 + 1, 2e6], [-1e6, -1e6 + 1, 3.0], [-1e300, 1e300, 0.0], [0.0, 0.0, 0.0]])
def test_softmax_split_is_stable_for_huge_kappa(cross: list[float]) -> None:
    kappa = np.array(cross)
    grams = Grams(retain=np.abs(kappa) + 1, forget=np.abs(kappa) + 1, cross=kappa)
    with np.errstate(all="raise", under="ignore"):  # a share that underflows to 0 is right, nothing else may happen
        shares = split_constraint(grams, 3.0, "softmax_dp")
    assert np.isfinite(shares).all()
    assert shares.sum() == pytest.approx(3.0, rel=16 * EPS, abs=0)
    assert shares.argmax() == kappa.argmin()  # the least hard block carries most
    if kappa[1] - kappa[0] == 1:
        assert shares[1] / shares[0] == pytest.approx(np.exp(-1), rel=1e-9, abs=0)  # 1e6 + 1 is exact, so only exp rounds


@pytest.mark.parametrize("split", SPLITS)
def test_block_of_two_zero_gradients_gets_no_share(split: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        grams = random_grams(rng, blocks=6)
        dead = np.arange(6) % 2 == 1  # a fresh LoRA adapter: every other matrix has no gradient
        fresh = Grams(*(np.where(dead, 0.0, part) for part in (grams.retain, grams.forget, grams.cross)))
        shares = split_constraint(fresh, 1.0, split)
        alone = split_constraint(Grams(*(part[~dead] for part in (grams.retain, grams.forget, grams.cross))), 1.0, split)
        assert not shares[dead].any()
        assert shares[~dead] == pytest.approx(alone, rel=16 * EPS, abs=0)


@pytest.mark.parametrize("method", HAMU_METHODS)
@pytest.mark.parametrize("split", SPLITS)
def test_fresh_adapter_is_feasible_where_its_live_half_is(method: str, split: str) -> None:
    generator = torch.Generator().manual_seed(0)
    live = [torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(4)]
    zero = torch.zeros(2, 3, dtype=torch.float64)
    retain, forget = [live[0], zero, live[1], zero], [live[2], zero, live[3], zero]
    lr = 0.1
    products = [float(a.norm() * b.norm()) for a, b in zip(live[:2], live[2:], strict=True)]
    constraint = 0.9 * lr * min(products)  # within reach of a single block, so of both under any split
    step = combine_gradients(method, retain, forget, lr=lr, constraint=constraint, split=split)
    assert step.stop_reason is None
    assert step.branches[1::2] == ("direct", "direct")
    assert not step.updates[1].any()
    assert not step.updates[3].any()
    gained = step.predicted_forget_change if method == "hamu-q" else -step.predicted_retain_change
    assert gained >= constraint * (1 - 1e-12)  # rounding of a dozen products


@pytest.mark.parametrize("split", SPLITS)
def test_all_zero_gradients_still_share_the_whole_constraint(split: str) -> None:
    zero = np.zeros(3)
    assert split_constraint(Grams(zero, zero, zero), 0.3, split) == pytest.approx(np.full(3, 0.1), rel=4 * EPS, abs=0)


def test_grad_norm_split_survives_a_model_without_any_forget_gradient() -> None:
    retain = np.array([1.0, 4.0, 0.0])
    shares = split_constraint(Grams(retain, np.zeros(3), np.zeros(3)), 0.3, "grad_norm")
    assert shares == pytest.approx([0.15, 0.15, 0.0], rel=4 * EPS, abs=0)


@pytest.mark.parametrize("method", ["hamu-q", "hamu-u", "ft"])
@pytest.mark.parametrize("choice", ["stop", "continue"])
@pytest.mark.parametrize("constraint", [0.0, 0.1])
def test_raw_softmax_share_that_overflows_makes_no_step_that_is_not_finite(method: str, choice: str, constraint: float) -> None:
    """exp(1e4) overflows: no constraint must stay none, and one beyond all numbers must be refused, not followed."""
    grads = torch.full((4,), 50.0, dtype=torch.float64)
    options = {"split": "softmax_dp", "normalize_split": False, "on_infeasible": choice}
    step = combine_gradients(method, [grads], [-grads], lr=0.1, constraint=constraint, **options)
    assert step.updates[0].isfinite().all()
    if method == "ft" or constraint == 0:
        assert step.stop_reason is None
        assert step.constraints == (0.0,)
        assert step.stopping_margin <= 0
    elif choice == "stop":
        assert step.stop_reason == "infeasible"


def test_raw_grad_norm_shares_multiply_the_constraint_by_the_norm_product() -> None:
    grams = random_grams(np.random.default_rng(3))
    shares = split_constraint(grams, 0.5, "grad_norm", normalize=False)
    assert shares == pytest.approx(0.5 * grams.retain_norm * grams.forget_norm, rel=4 * EPS, abs=0)
    uniform = split_constraint(grams, 0.5, "uniform", normalize=False)
    assert uniform == pytest.approx(np.full(5, 0.1), rel=4 * EPS, abs=0)


def test_radius_is_lr_times_the_own_gradient_or_fixed() -> None:
    grams = random_grams(np.random.default_rng(4))
    assert np.array_equal(step_radius(grams, 0.5, None), 0.5 * np.sqrt(grams.retain))
    assert np.array_equal(step_radius(grams, 0.5, 0.25), np.full(5, 0.25))


# ---- stopping rules


def roles(method: str, grams: Grams) -> Grams:
    return grams if method == "hamu-q" else Grams(retain=grams.forget, forget=grams.retain, cross=grams.cross)


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_aggregate_rule_fires_where_the_ratio_exceeds_the_sum_of_norms_and_sines_whatever_the_lr(method: str) -> None:
    rng = np.random.default_rng(5)
    fired = 0
    for case in range(400):
        blocks = int(rng.integers(1, 6))
        angles = rng.uniform(0.05, np.pi - 0.05, blocks)
        norms = 10.0 ** rng.uniform(-2, 2, (2, blocks))
        grams = plane_grams(angles, *norms)
        bound = float((norms[0] * norms[1] * np.sin(angles)).sum())
        # 1 - cos^2 loses at most EPS / sin^2(0.05) = 400 EPS: 1e-9 on either side of the bound is far outside that.
        for ratio in (bound * (1 - 1e-9), bound * (1 + 1e-9), bound * rng.uniform(0, 2)):
            for lr in (1e-6, 1e-2, 1.0):
                decision = decide(method, grams, lr=lr, constraint=ratio * lr, split=SPLITS[case % 3])
                assert decision.hardness.stopping_rhs == pytest.approx(lr * bound, rel=1e-12, abs=0)  # 400 EPS is 1e-13
                fires = decision.hardness.stopping_margin > 0
                assert fires == (ratio > bound)
                fired += fires
    assert 1200 < fired < 3000


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
    for _ in range(2500):
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
    assert min(harmed, helped) > 400
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
    for _ in range(700):
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
    for _ in range(100):
        grams = random_grams(rng)
        ratios = [
            decide(method, grams, lr=lr, constraint=constraint, split=split, full_grad=full_grad).hardness.max_constraint_ratio
            for lr in (1e-7, 3e-3, 1.0)
            for constraint in (0.0, 1e-3)
            for split in SPLITS
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
