"""What every rule promises on models of several blocks, on thousands of random gradient pairs.

The updates are made here with plain einsum from the weights, so a mistake in a flat buffer cannot hide one in a rule;
`test_rules_equivalences.py` goes through `combine_gradients` with tensors of real shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from hamu.methods.catalog import METHODS
from hamu.methods.combine import Decision, StepRules, decide_step
from hamu.methods.gram import Grams
from hamu.methods.names import CONSTRAINT_SPLITS, HAMU_METHODS, METHOD_NAMES

EPS = np.finfo(np.float64).eps
N_CASES, N_BLOCKS, DIM = 2000, 4, 3


@dataclass(frozen=True)
class Sample:
    """Random cases of one method and what the engine decided: gradients and updates (n, blocks, dim)."""

    retain: np.ndarray
    forget: np.ndarray
    lr: np.ndarray
    rules: list[StepRules]
    decisions: list[Decision]

    @property
    def updates(self) -> np.ndarray:
        table = np.stack([decision.table for decision in self.decisions])
        return table[..., :1] * self.retain + table[..., 1:] * self.forget

    @property
    def radius(self) -> np.ndarray:
        return np.array([np.nan if rules.radius is None else rules.radius for rules in self.rules])

    @property
    def constraint(self) -> np.ndarray:
        return np.array([rules.constraint for rules in self.rules])

    @property
    def is_full(self) -> np.ndarray:
        return np.array([rules.full_grad for rules in self.rules])

    @property
    def branches(self) -> np.ndarray:
        return np.array([decision.branches for decision in self.decisions])

    def floats(self, name: str) -> np.ndarray:
        return np.array([getattr(decision.hardness, name) for decision in self.decisions])

    @property
    def is_withheld(self) -> np.ndarray:
        return np.array([decision.stop_reason is not None for decision in self.decisions])


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...d,...d->...", a, b)


def norm(a: np.ndarray) -> np.ndarray:
    return np.sqrt(dot(a, a))


def grams_of(retain: np.ndarray, forget: np.ndarray) -> Grams:
    return Grams(retain=dot(retain, retain), forget=dot(forget, forget), cross=dot(retain, forget))


def draw(method: str, seed: int) -> Sample:
    """Draw pairs at scales 1e-4..1e4, aligned to any degree, some blocks zero, under every option."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-4, 4, (2, N_CASES, 1, 1)) * 10.0 ** rng.uniform(-2, 2, (2, N_CASES, N_BLOCKS, 1))
    retain = rng.standard_normal((N_CASES, N_BLOCKS, DIM))
    mix = rng.uniform(-1, 1, (N_CASES, 1, 1))
    forget = scale[1] * (mix * retain + (1 - np.abs(mix)) * rng.standard_normal(retain.shape))
    retain = scale[0] * retain
    both, one = rng.random((2, N_CASES, N_BLOCKS))
    both[:, 0] = one[:, 0] = 1.0  # at least one live block
    retain = np.where(((both < 0.1) | (one < 0.03))[..., None], 0.0, retain)
    forget = np.where(((both < 0.1) | ((one > 0.03) & (one < 0.06)))[..., None], 0.0, forget)
    lr = 10.0 ** rng.uniform(-6, 0, N_CASES)
    rules, decisions = [], []
    for case in range(N_CASES):
        grams = grams_of(retain[case], forget[case])
        product = grams.retain_norm * grams.forget_norm
        mode = (*CONSTRAINT_SPLITS, "full")[case % 4]
        fixed = None if rng.random() < 0.5 else float(lr[case] * 10.0 ** rng.uniform(-1, 1) * grams.retain_norm.max())
        if mode == "full":
            reach = np.sqrt(grams.retain.sum() * grams.forget.sum())
        else:
            reach = product.sum() if mode == "grad_norm" else product[product > 0].min() * 2
        constraint = float(rng.choice([0.0, rng.random(), rng.random(), 1.2]) * lr[case] * reach)
        rules.append(
            StepRules(
                constraint=constraint,
                radius=fixed,
                split=mode if mode != "full" else "grad_norm",
                full_grad=mode == "full",
                on_infeasible=("stop", "continue")[int(rng.integers(2))],
            )
        )
        decisions.append(decide_step(METHODS[method], grams, lr=float(lr[case]), rules=rules[-1]))
    return Sample(retain, forget, lr, rules, decisions)


@pytest.fixture(scope="module")
def samples() -> dict[str, Sample]:
    return {method: draw(method, seed) for seed, method in enumerate(METHOD_NAMES)}


def sine(retain: np.ndarray, forget: np.ndarray) -> np.ndarray:
    """sin of the angle from the rejection of one vector from the other: no cancellation; 1 where either is zero."""
    unit = retain / np.maximum(norm(retain), 1e-300)[..., None]
    rest = forget - dot(unit, forget)[..., None] * unit
    sin = norm(rest) / np.maximum(norm(forget), 1e-300)
    return np.where((norm(retain) > 0) & (norm(forget) > 0), np.maximum(sin, 1e-6), 1.0)


def flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)


# ---- every rule


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_predicted_changes_are_inner_products_with_the_updates(samples: dict[str, Sample], method: str) -> None:
    sample = samples[method]
    updates = sample.updates
    for name, grads in (("predicted_retain_change", sample.retain), ("predicted_forget_change", sample.forget)):
        exact = dot(flat(grads), flat(updates))
        table = np.stack([decision.table for decision in sample.decisions])
        terms = norm(grads) * (np.abs(table[..., 0]) * norm(sample.retain) + np.abs(table[..., 1]) * norm(sample.forget))
        # Both are sums of the same products in another order: rounding of the largest terms, 12 products each.
        assert (np.abs(sample.floats(name) - exact) <= 16 * EPS * terms.sum(axis=1)).all()


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_weights_are_finite_and_zero_only_as_a_whole_where_withheld(samples: dict[str, Sample], method: str) -> None:
    sample = samples[method]
    table = np.stack([decision.table for decision in sample.decisions])
    assert np.isfinite(table).all()
    assert not table[sample.is_withheld].any()
    assert table[~sample.is_withheld].any(axis=(1, 2)).mean() > 0.9
    stops = np.array([rules.on_infeasible == "stop" for rules in sample.rules])
    assert np.array_equal(sample.is_withheld, stops & (sample.branches == "infeasible").any(axis=1))
    assert sample.is_withheld.any() == (method in HAMU_METHODS)


def test_one_role_methods_move_along_their_own_gradient(samples: dict[str, Sample]) -> None:
    ft, ga = samples["ft"], samples["ga"]
    lr = ft.lr[:, None, None]
    assert np.array_equal(ft.updates, -lr * ft.retain)  # a product with 0 is added: exact
    assert np.array_equal(ga.updates, ga.lr[:, None, None] * ga.forget)


@pytest.mark.parametrize("method", ["gdiff", "kl", "scrub"])
def test_difference_methods_take_half_of_each(samples: dict[str, Sample], method: str) -> None:
    sample = samples[method]
    expected = -sample.lr[:, None, None] * (sample.retain - sample.forget) / 2
    size = sample.lr[:, None] * (norm(sample.retain) + norm(sample.forget))
    assert (norm(sample.updates - expected) <= 4 * EPS * size).all()  # three roundings


def test_gru_is_the_forget_gradient_projected_off_the_retain_gradient_of_the_whole_model(
    samples: dict[str, Sample],
) -> None:
    sample = samples["gru"]
    g_r, g_f = flat(sample.retain), flat(sample.forget)
    conflict = dot(g_r, g_f) > 0
    expected = np.where(conflict[:, None], g_f - (dot(g_r, g_f) / dot(g_r, g_r))[:, None] * g_r, g_f) * sample.lr[:, None]
    # Sums of 12 products in another order.
    assert (norm(flat(sample.updates) - expected) <= 32 * EPS * sample.lr * norm(g_f)).all()
    assert 400 < conflict.sum() < 1600


def test_pcgrad_is_algorithm_1_on_the_whole_model(samples: dict[str, Sample]) -> None:
    sample = samples["pcgrad"]
    first, second = flat(sample.retain), -flat(sample.forget)
    product = dot(first, second)
    conflict = (product < 0)[:, None]
    turned_first = np.where(conflict, first - (product / dot(second, second))[:, None] * second, first)
    turned_second = np.where(conflict, second - (product / dot(first, first))[:, None] * first, second)
    expected = -sample.lr[:, None] * (turned_first + turned_second) / 2
    # Sums of 12 products in another order.
    assert (norm(flat(sample.updates) - expected) <= 32 * EPS * sample.lr * (norm(first) + norm(second))).all()


@pytest.mark.parametrize("method", ["gru", "pcgrad"])
def test_projected_methods_never_raise_retain_loss_nor_lower_forget_loss(samples: dict[str, Sample], method: str) -> None:
    sample = samples[method]
    g_r, g_f, updates = flat(sample.retain), flat(sample.forget), flat(sample.updates)
    # Where the projection leaves 0 rounding may leave EPS of its terms, 12 products each.
    slack = 32 * EPS * sample.lr * (norm(g_r) + norm(g_f))
    assert (dot(g_r, updates) <= slack * norm(g_r)).all()
    assert (dot(g_f, updates) >= -slack * norm(g_f)).all()


def test_gru_leaves_retain_loss_alone_in_a_conflict_and_keeps_the_gradient_otherwise(
    samples: dict[str, Sample],
) -> None:
    sample = samples["gru"]
    g_r, g_f, updates = flat(sample.retain), flat(sample.forget), flat(sample.updates)
    conflict = dot(g_r, g_f) > 0
    change = np.abs(dot(g_r, updates))
    assert (change <= 32 * EPS * sample.lr * norm(g_r) * norm(g_f))[conflict].all()  # 12 products cancel
    assert np.array_equal(updates[~conflict], (sample.lr[:, None] * g_f)[~conflict])


# ---- HAMU's rules


def own_and_bound(sample: Sample, method: str) -> tuple[np.ndarray, np.ndarray]:
    """(gradient of the free loss to lower, of the loss to raise): whose length is the radius, whose rise is asked."""
    return (sample.retain, sample.forget) if method == "hamu-q" else (-sample.forget, -sample.retain)


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_step_of_each_block_stays_in_its_radius(samples: dict[str, Sample], method: str) -> None:
    sample = samples[method]
    own, bound = own_and_bound(sample, method)
    radius = np.where(np.isnan(sample.radius)[:, None], sample.lr[:, None] * norm(own), sample.radius[:, None])
    length, sin = norm(sample.updates), sine(own, bound)
    bounded = ~sample.is_full[:, None] & (sample.branches != "infeasible")
    # An error of 4 EPS in the Gram is one of 4 EPS / sin^2 in the length of the free part; sums of 3 double it.
    assert (length <= radius * (1 + 16 * EPS / sin**2))[bounded].all()
    assert bounded.sum() > 4000


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_each_feasible_block_meets_its_share_of_the_constraint(samples: dict[str, Sample], method: str) -> None:
    sample = samples[method]
    own, bound = own_and_bound(sample, method)
    shares = np.stack([decision.constraints for decision in sample.decisions])
    gained, sin = dot(bound, sample.updates), sine(own, bound)
    met = ~sample.is_full[:, None] & ~sample.is_withheld[:, None] & (sample.branches != "zero_forget_grad")
    # Two terms of size (length / sin) cancel down to the constraint, with 3 products each.
    slack = 32 * EPS * norm(bound) * norm(sample.updates) / sin
    assert (gained >= shares - slack)[met].all()
    assert met.sum() > 3000
    rectified = met & (sample.branches == "rectified")
    assert (np.abs(gained - shares) <= slack)[rectified].all()
    assert rectified.sum() > 500


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_full_gradient_step_obeys_radius_and_constraint_as_one_vector(samples: dict[str, Sample], method: str) -> None:
    sample = samples[method]
    own, bound = (flat(part) for part in own_and_bound(sample, method))
    updates = flat(sample.updates)
    rows = sample.is_full & (sample.branches[:, 0] != "infeasible")
    radius = np.where(np.isnan(sample.radius), sample.lr * norm(own), sample.radius)
    sin = sine(own, bound)
    # As per block, with 12 products in a sum.
    assert (norm(updates) <= radius * (1 + 32 * EPS / sin**2))[rows].all()
    slack = 64 * EPS * norm(bound) * norm(updates) / sin
    assert (dot(bound, updates) >= sample.constraint - slack)[rows].all()
    rectified = rows & (sample.branches[:, 0] == "rectified")
    assert (norm(updates) >= radius * (1 - 32 * EPS / sin**2))[rectified].all()
    assert (np.abs(dot(bound, updates) - sample.constraint) <= slack)[rectified].all()
    assert rectified.sum() > 50
    assert (sample.branches[sample.is_full] == sample.branches[sample.is_full][:, :1]).all()  # the one branch, repeated


@pytest.mark.parametrize("method", HAMU_METHODS)
def test_hamu_meets_the_whole_constraint_unless_withheld(samples: dict[str, Sample], method: str) -> None:
    sample = samples[method]
    gained = sample.floats("predicted_forget_change" if method == "hamu-q" else "predicted_retain_change")
    gained = gained if method == "hamu-q" else -gained
    rows = ~sample.is_withheld & ~(sample.branches == "zero_forget_grad").any(axis=1)
    own, bound = own_and_bound(sample, method)
    slack = 64 * EPS * (norm(bound) * norm(sample.updates) / sine(own, bound)).sum(axis=1)  # per block as above, summed
    assert (gained >= sample.constraint - slack)[rows].all()
    assert rows.sum() > 1000


@pytest.mark.parametrize("seed", range(4))
def test_with_grad_norm_split_and_lr_radius_all_blocks_are_feasible_or_none(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(100):
        retain, forget = rng.standard_normal((2, 6, DIM)) * 10.0 ** rng.uniform(-3, 3, (2, 6, 1))
        lr, grams = 10.0 ** rng.uniform(-6, 0), grams_of(retain, forget)
        reach = lr * float((grams.retain_norm * grams.forget_norm).sum())
        for method in HAMU_METHODS:
            for ratio, feasible in ((1 - 1e-9, True), (1.0, True), (1 + 1e-9, False)):  # 1.0: the slack is 1e-12
                decision = decide_step(METHODS[method], grams, lr=lr, rules=StepRules(constraint=ratio * reach))
                assert [branch != "infeasible" for branch in decision.branches] == [feasible] * 6
