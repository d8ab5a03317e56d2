"""Objectives: values by definition, gradients by finite differences, and sums that do not mind how a step is split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hamu.methods.base import MethodSettings
from hamu.methods.catalog import METHODS
from hamu.methods.names import METHOD_NAMES
from hamu.methods.objectives import Objective, cross_entropy, kl_to_original, weighted

EPS = np.finfo(np.float64).eps
N_ROWS, N_CLASSES = 7, 5

OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": cross_entropy,
    "kl_to_original": kl_to_original,
    "weighted": weighted(0.3, kl_to_original, 0.7, cross_entropy),
    **{
        f"{name}-{role}": factory(MethodSettings())
        for name in METHOD_NAMES
        for role, factory in (("retain", METHODS[name].retain), ("forget", METHODS[name].forget))
        if factory is not None
    },
}


def batch(seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, original = (scale * torch.randn(N_ROWS, N_CLASSES, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits, torch.randint(N_CLASSES, (N_ROWS,), generator=generator), original


def test_cross_entropy_is_the_negative_log_probability_of_the_label() -> None:
    logits, labels, _ = batch()
    expected = -torch.log(torch.softmax(logits, dim=1))[torch.arange(N_ROWS), labels]
    torch.testing.assert_close(cross_entropy(logits, labels), expected, rtol=1e-12, atol=1e-14)  # log of softmax loses digits


def test_kl_is_taken_from_the_original_to_the_current_model() -> None:
    logits, labels, original = batch()
    p, q = torch.softmax(original, dim=1), torch.softmax(logits, dim=1)
    expected = (p * (p / q).log()).sum(dim=1)
    torch.testing.assert_close(kl_to_original(logits, labels, original), expected, rtol=1e-12, atol=1e-14)
    reverse = (q * (q / p).log()).sum(dim=1)
    assert not torch.allclose(expected, reverse)  # so that the line above can tell the two apart


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kl_at_the_original_is_zero_with_zero_gradient(dtype: torch.dtype) -> None:
    logits, labels, _ = batch()
    logits = logits.to(dtype).requires_grad_()
    losses = kl_to_original(logits, labels, logits.detach().clone())
    assert not losses.any()  # the same numbers are subtracted: exact
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    # p - p * (sum of p): the sum of five probabilities is 1 up to rounding, in float32 at least.
    assert float(grad.abs().max()) <= 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def test_kl_is_never_negative() -> None:
    for seed in range(200):
        logits, labels, original = batch(seed, scale=10.0 ** (seed % 4 - 2))
        # A sum of five terms of size at most |log q| ~ 1000 each, weighted by p, that may cancel.
        assert (kl_to_original(logits, labels, original) >= -1e3 * 8 * EPS).all()


@pytest.mark.parametrize("half", ["logits", "original"])
def test_kl_with_one_side_in_half_precision_is_taken_in_float32(half: str) -> None:
    logits, labels, original = (tensor.float() if tensor.is_floating_point() else tensor for tensor in batch())
    if half == "logits":
        logits = logits.bfloat16()
    else:
        original = original.bfloat16()
    exact = kl_to_original(logits.double(), labels, original.double()).float()
    # The inputs are what they are; softmax and sum in float32 lose about 1e-6 of them, in bfloat16 1e-2.
    torch.testing.assert_close(kl_to_original(logits, labels, original), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_is_one_finite_non_negative_loss_a_label(name: str) -> None:
    logits, labels, original = batch()
    losses = OBJECTIVES[name](logits, labels, original)
    assert losses.shape == (N_ROWS,)
    assert losses.isfinite().all()
    assert (losses >= 0).all()  # un-negated: cross-entropy and KL are never negative


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_equals_finite_differences(name: str, seed: int) -> None:
    logits, labels, original = batch(seed)
    objective = OBJECTIVES[name]
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(objective(logits, labels, original).sum(), logits)
    h = 1e-5
    numeric = torch.zeros_like(logits)
    with torch.no_grad():
        for index in range(logits.numel()):
            bump = torch.zeros(logits.numel(), dtype=torch.float64)
            bump[index] = h
            bump = bump.view_as(logits)
            up, down = (objective(logits + sign * bump, labels, original).sum() for sign in (1, -1))
            numeric.view(-1)[index] = (up - down) / (2 * h)
    # Truncation h^2 / 6 times a third derivative below 1, rounding 30 EPS / h: both under 1e-9.
    torch.testing.assert_close(grad, numeric, rtol=0, atol=2e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_sums_over_micro_batches_equal_the_whole(name: str) -> None:
    logits, labels, original = batch()
    objective = OBJECTIVES[name]
    whole_logits = logits.clone().requires_grad_()
    whole = objective(whole_logits, labels, original)
    (whole_grad,) = torch.autograd.grad(whole.sum() / N_ROWS, whole_logits)
    for sizes in ((3, 4), (1, 6), (1,) * N_ROWS):
        parts = [part.clone().requires_grad_() for part in logits.split(sizes)]
        losses = [
            objective(part, label, first)
            for part, label, first in zip(parts, labels.split(sizes), original.split(sizes), strict=True)
        ]
        torch.testing.assert_close(torch.cat(losses), whole, rtol=8 * EPS, atol=8 * EPS)  # rows do not know each other
        grads = torch.autograd.grad(sum(loss.sum() for loss in losses) / N_ROWS, parts)
        torch.testing.assert_close(torch.cat(grads), whole_grad, rtol=8 * EPS, atol=8 * EPS)


def test_weighted_is_the_weighted_sum_of_values_and_gradients() -> None:
    logits, labels, original = batch()
    logits.requires_grad_()
    both = weighted(0.001, kl_to_original, 0.99, cross_entropy)(logits, labels, original)
    kl, ce = kl_to_original(logits, labels, original), cross_entropy(logits, labels)
    torch.testing.assert_close(both, 0.001 * kl + 0.99 * ce, rtol=4 * EPS, atol=0)  # the same three operations
    grads = [torch.autograd.grad(part.sum(), logits, retain_graph=True)[0] for part in (both, kl, ce)]
    torch.testing.assert_close(grads[0], 0.001 * grads[1] + 0.99 * grads[2], rtol=0, atol=16 * EPS)  # entries are below 1


def test_scrub_follows_its_settings() -> None:
    logits, labels, original = batch()
    factory = METHODS["scrub"].retain
    assert factory is not None
    kl, ce = kl_to_original(logits, labels, original), cross_entropy(logits, labels)
    default = factory(MethodSettings())(logits, labels, original)
    torch.testing.assert_close(default, 0.001 * kl + 0.99 * ce, rtol=4 * EPS, atol=0)  # the same three operations
    other = factory(MethodSettings(scrub_alpha=2.0, scrub_gamma=0.5))(logits, labels, original)
    torch.testing.assert_close(other, 2.0 * kl + 0.5 * ce, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_logits_give_finite_losses_and_gradients(name: str) -> None:
    logits, labels, original = batch(scale=1e4)
    logits.requires_grad_()
    losses = OBJECTIVES[name](logits, labels, original)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_logits_give_float32_losses(name: str) -> None:
    logits, labels, original = batch()
    assert OBJECTIVES[name](logits.bfloat16(), labels, original.bfloat16()).dtype == torch.float32
