"""How blocks share a constraint: the formulas, their sums, and blocks without gradients; the radius of a block."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hamu import combine_gradients
from hamu.methods.gram import Grams
from hamu.methods.hardness import split_constraint, step_radius
from hamu.methods.names import CONSTRAINT_SPLITS, HAMU_METHODS

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


@pytest.mark.parametrize("split", CONSTRAINT_SPLITS)
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


@pytest.mark.parametrize("split", CONSTRAINT_SPLITS)
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
@pytest.mark.parametrize("split", CONSTRAINT_SPLITS)
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


@pytest.mark.parametrize("split", CONSTRAINT_SPLITS)
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
