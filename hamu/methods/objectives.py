"""Objectives of the methods: losses per label, never negated; only a combine rule chooses a direction.

An objective maps a batch of logits to one loss per label. The caller sums them and divides by the number of labels of the whole
step, so that a step split into parts or over processes gives the same number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from hamu.scores import at_least_float32, cross_entropy_rows

Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(logits (n, classes), labels (n,), original model's logits (n, classes) or None) -> losses in nats, shape (n,)."""


def cross_entropy(logits: Tensor, labels: Tensor, original_logits: Tensor | None = None) -> Tensor:
    """Negative log-probability of each label, in nats, shape (n,)."""
    return cross_entropy_rows(logits, labels)


def kl_to_original(logits: Tensor, labels: Tensor, original_logits: Tensor | None) -> Tensor:
    """KL(original || current) of each label's distribution, in nats, shape (n,).

    Source: SCRUB, arXiv 2302.09880, eq. 1, at temperature 1.
    """
    assert original_logits is not None, "the engine passes the original model's logits to methods that need them"
    target = F.log_softmax(at_least_float32(original_logits), dim=-1)
    return F.kl_div(F.log_softmax(at_least_float32(logits), dim=-1), target, reduction="none", log_target=True).sum(dim=-1)


def weighted(alpha: float, first: Objective, gamma: float, second: Objective) -> Objective:
    """Make the objective alpha * first + gamma * second."""

    def objective(logits: Tensor, labels: Tensor, original_logits: Tensor | None) -> Tensor:
        return alpha * first(logits, labels, original_logits) + gamma * second(logits, labels, original_logits)

    return objective
