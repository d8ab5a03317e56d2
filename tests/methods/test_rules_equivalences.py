"""Two ways to one step: roles swapped, blocks joined or reordered, gradients scaled, weights applied by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hamu import combine_gradients
from hamu.methods.catalog import METHODS
from hamu.methods.combine import StepRules, decide_step
from hamu.methods.gram import Grams
from hamu.methods.names import CONSTRAINT_SPLITS, HAMU_METHODS, METHOD_NAMES

SHAPES = ((3, 2), (5,), (), (2, 2, 3, 3))


def random_pair(rng: np.random.Generator, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> tuple[list[Tensor], list[Tensor]]:
    scales = 10.0 ** rng.uniform(-2, 2, (2, len(shapes)))
    return tuple(  # type: ignore[return-value]
        [torch.from_numpy(np.asarray(scales[role, i] * rng.standard_normal(shape))) for i, shape in enumerate(shapes)]
        for role in range(2)
    )


def reach_of(pair: tuple[list[Tensor], list[Tensor]], lr: float) -> float:
    return lr * sum(float(a.norm() * b.norm()) for a, b in zip(*pair, strict=True))


def joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def assert_close(actual: Tensor, expected: Tensor, share: float) -> None:
    assert float((actual - expected).norm()) <= share * float(expected.norm())


RANDOM_SHARE = 1e-9
"""Of the update's length. Rounding is EPS / sin^2: a random pair of blocks of 5 or more numbers has sin > 0.01 or so, a
scalar block is exactly colinear; 1e-9 leaves a factor of 1000."""


@pytest.mark.parametrize("seed", range(50))
def test_hamu_u_is_hamu_q_with_roles_swapped_and_negated(seed: int) -> None:
    rng = np.random.default_rng(seed)
    retain, forget = random_pair(rng)
    lr = 10.0 ** rng.uniform(-5, 0)
    options = {
        "lr": lr,
        "constraint": float(rng.uniform(0, 0.9) * reach_of((retain, forget), lr)),
        "full_grad": seed % 5 == 0,
        "split": CONSTRAINT_SPLITS[seed % 3],
        "radius": None if seed % 2 else lr,
        "on_infeasible": "continue",
    }
    u = combine_gradients("hamu-u", retain, forget, **options)
    q = combine_gradients("hamu-q", [-g for g in forget], [-g for g in retain], **options)
    for ours, theirs in zip(u.updates, q.updates, strict=True):
        # The same two products, added in the other order: addition commutes, so only fused rounding may differ.
        assert_close(ours, theirs, RANDOM_SHARE)
    assert u.branches == q.branches
    assert u.constraints == q.constraints
    assert u.stopping_margins["aggregate"] == q.stopping_margins["aggregate"]
    assert u.stopping_margins["feasible"] == q.stopping_margins["feasible"]
    assert u.stopping_margins["predicted"] == pytest.approx(q.stopping_margins["predicted"], rel=1e-9, abs=0)
    assert (u.kappa, u.max_constraint_ratio, u.stopping_rhs) == (q.kappa, q.max_constraint_ratio, q.stopping_rhs)
    assert u.predicted_retain_change == pytest.approx(-q.predicted_forget_change, rel=1e-9, abs=0)
    assert u.predicted_forget_change == pytest.approx(-q.predicted_retain_change, rel=1e-9, abs=0)


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("seed", range(15))
def test_full_gradient_mode_is_one_concatenated_block(method: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    retain, forget = random_pair(rng)
    lr = 10.0 ** rng.uniform(-5, 0)
    whole = (joined(retain), joined(forget))
    options = {
        "lr": lr,
        "constraint": float(rng.uniform(0, 1.1) * lr * whole[0].norm() * whole[1].norm()),
        "radius": None if seed % 2 else lr * float(whole[seed % 4 // 2].norm()),
        "on_infeasible": "continue",
    }
    split = combine_gradients(method, retain, forget, full_grad=True, **options)
    one = combine_gradients(method, [whole[0]], [whole[1]], **options)
    assert_close(joined(split.updates), one.updates[0], RANDOM_SHARE)
    assert split.branches == one.branches * len(SHAPES)
    for name in ("kappa", "gradient_product", "stopping_rhs", "max_constraint_ratio"):
        # Sums of the same products in another order; kappa may cancel, to no less than ~1e-3 of its terms here.
        scale = one.gradient_product if name == "kappa" else abs(getattr(one, name))
        assert getattr(split, name) == pytest.approx(getattr(one, name), rel=0, abs=1e-12 * scale)


@pytest.mark.parametrize("method", ["gru", "pcgrad"])
def test_methods_of_one_block_do_so_whatever_the_mode(method: str) -> None:
    retain, forget = random_pair(np.random.default_rng(3))
    by_block = combine_gradients(method, retain, forget, lr=0.1)
    full = combine_gradients(method, retain, forget, lr=0.1, full_grad=True)
    assert all(torch.equal(a, b) for a, b in zip(by_block.updates, full.updates, strict=True))


@pytest.mark.parametrize("method", [name for name in METHOD_NAMES if not METHODS[name].one_block])
@pytest.mark.parametrize("split", ["grad_norm", "uniform"])
def test_order_of_blocks_does_not_matter(method: str, split: str) -> None:
    retain, forget = random_pair(np.random.default_rng(4))
    order = [2, 0, 3, 1]
    options = {
        "lr": 0.1,
        "constraint": 0.01 * reach_of((retain, forget), 0.1),
        "split": split,
        "on_infeasible": "continue",
    }
    first = combine_gradients(method, retain, forget, **options)
    second = combine_gradients(method, [retain[i] for i in order], [forget[i] for i in order], **options)
    assert [first.branches[i] for i in order] == list(second.branches)
    for i, update in zip(order, second.updates, strict=True):
        assert_close(update, first.updates[i], RANDOM_SHARE)  # only the sum that normalises the split is in another order


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("seed", range(10))
def test_scaling_a_gradient_by_a_power_of_two_scales_the_step_to_the_bit(method: str, seed: int) -> None:
    """No absolute threshold: powers of two change exponents only, so the same branches and bits must come out."""
    rng = np.random.default_rng(seed)
    retain, forget = random_pair(rng)
    a, b = (2.0 ** int(rng.integers(-100, 100)) for _ in range(2))
    if method not in HAMU_METHODS:
        b = a  # the others add the two gradients, so only a common factor factors out
    lr = 0.125
    share = 0.0 if seed % 4 == 0 else float(rng.uniform(0, 0.9))
    constraint = share * reach_of((retain, forget), lr)
    options = {
        "lr": lr,
        "full_grad": seed % 3 == 0,
        "split": ("grad_norm", "uniform")[seed % 2],
        "on_infeasible": "continue",
    }
    before = combine_gradients(method, retain, forget, constraint=constraint, **options)
    after = combine_gradients(method, [a * g for g in retain], [b * g for g in forget], constraint=a * b * constraint, **options)
    factor = b if method == "hamu-u" else a  # the lr radius is lr times the length of the free loss's gradient
    assert before.branches == after.branches
    assert all(torch.equal(factor * x, y) for x, y in zip(before.updates, after.updates, strict=True))
    if method in HAMU_METHODS:
        assert after.max_constraint_ratio == a * b * before.max_constraint_ratio
        assert after.stopping_margin == a * b * before.stopping_margin


@pytest.mark.parametrize("method", HAMU_METHODS)
@pytest.mark.parametrize("seed", range(10))
def test_with_a_fixed_radius_the_length_of_the_free_gradient_does_not_matter(method: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    retain, forget = random_pair(rng)
    factor = 2.0 ** int(rng.integers(-60, 60))
    options = {"radius": 0.125, "constraint": 0.01, "split": "uniform", "on_infeasible": "continue"}
    before = combine_gradients(method, retain, forget, **options)
    pair = ([factor * g for g in retain], forget) if method == "hamu-q" else (retain, [factor * g for g in forget])
    after = combine_gradients(method, *pair, **options)
    assert all(torch.equal(x, y) for x, y in zip(before.updates, after.updates, strict=True))


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("seed", range(25))
def test_public_update_is_the_decided_combination_of_the_gradients(method: str, seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    retain, forget = random_pair(rng)
    copies = [g.clone() for g in (*retain, *forget)]
    lr = 10.0 ** rng.uniform(-5, 0)
    constraint = float(rng.uniform(0, 1.1) * reach_of((retain, forget), lr))
    options = {"split": CONSTRAINT_SPLITS[seed % 3], "full_grad": seed % 4 == 0, "on_infeasible": ("continue", "stop")[seed % 2]}
    step = combine_gradients(method, retain, forget, lr=lr, constraint=constraint, **options)
    # The norms of the tensors, one by one: the plain form of what the flat buffers compute.
    grams = Grams(*(np.array([float((a * b).sum()) for a, b in zip(*p, strict=True)]) for p in (
        (retain, retain), (forget, forget), (retain, forget))))  # fmt: skip
    decision = decide_step(METHODS[method], grams, lr=lr, rules=StepRules(constraint=constraint, **options))
    assert step.branches == decision.branches
    assert step.stop_reason == decision.stop_reason
    for update, (w_r, w_f), g_r, g_f in zip(step.updates, decision.table, retain, forget, strict=True):
        assert update.shape == g_r.shape
        expected = w_r * g_r + w_f * g_f
        terms = abs(w_r) * g_r.norm() + abs(w_f) * g_f.norm()
        # Grams summed in another order change the weights by EPS / sin^2: see RANDOM_SHARE.
        assert float((update - expected).norm()) <= RANDOM_SHARE * float(terms)
    assert all(torch.equal(a, b) for a, b in zip(copies, (*retain, *forget), strict=True))  # inputs are left alone
