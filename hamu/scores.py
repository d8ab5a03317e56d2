"""Scores of a model on rows: cross-entropy, entropy, correctness, min-k log-probability, AUC of a membership test.

Pure functions of tensors. Half-precision logits are scored in float32; the sums over rows are the caller's, in float64.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def at_least_float32(logits: Tensor) -> Tensor:
    """Return the logits in float32 where their type is shorter, else as they are."""
    return logits.float() if logits.element_size() < 4 else logits


def cross_entropy_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each row, -log p(label).

    Args:
        logits: (n, classes), any float type.
        labels: (n,), int64 in [0, classes).

    Returns:
        (n,), nats, float32 or float64.
    """
    return functional.cross_entropy(at_least_float32(logits), labels, reduction="none")


def entropy_rows(logits: Tensor) -> Tensor:
    """Return the entropy of each row's distribution, -sum p log p, with 0 log 0 = 0.

    Args:
        logits: (n, classes), any float type.

    Returns:
        (n,), nats in [0, log(classes)]; NaN where a logit is NaN.
    """
    return torch.special.entr(torch.softmax(at_least_float32(logits), dim=-1)).sum(dim=-1)


def correct_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1 for each row whose largest logit is the label's, else 0; their mean is the accuracy.

    Args:
        logits: (n, classes).
        labels: (n,), int64.

    Returns:
        (n,), float64.
    """
    return (logits.argmax(dim=-1) == labels).double()


def min_k(logprobs: Tensor, valid: Tensor, k_pct: float) -> Tensor:
    """Return the mean of each row's lowest log-probabilities: k = max(1, int(k_pct * number of valid entries)).

    k is taken in float32, as the published numbers were, so that 0.29 of 100 is 29 and not 28.

    Args:
        logprobs: (n, t), log-probability of each label.
        valid: (n, t), bool; entries that count.
        k_pct: share of the valid entries, in (0, 1].

    Returns:
        (n,), nats, at most 0; NaN where no entry is valid.

    Source: Shi et al., "Detecting Pretraining Data from Large Language Models" (Min-K% Prob).
    """
    counts = valid.sum(dim=-1)
    k = (counts.to(torch.float32) * k_pct).long().clamp(min=1)
    ordered = logprobs.masked_fill(~valid, torch.inf).sort(dim=-1).values
    lowest = torch.arange(logprobs.shape[-1], device=logprobs.device) < torch.minimum(k, counts)[:, None]
    sums = ordered.masked_fill(~lowest, 0.0).sum(dim=-1)
    return torch.where(counts > 0, sums / k, torch.nan)


def auc(negatives: Tensor | np.ndarray, positives: Tensor | np.ndarray) -> float:
    """Return P(positive > negative) + P(positive = negative) / 2 over all pairs, in O(n log n).

    A score that is NaN counts as 0, as in the published numbers.

    Args:
        negatives: (n,), scores of the rows that should be low.
        positives: (m,), scores of the rows that should be high.

    Returns:
        The area under the ROC curve, in [0, 1]; NaN when one side has no rows.
    """
    low, high = np.sort(_scores(negatives)), _scores(positives)
    if low.size == 0 or high.size == 0:
        return float("nan")
    wins = np.searchsorted(low, high, side="left").sum(dtype=np.int64)
    wins_and_ties = np.searchsorted(low, high, side="right").sum(dtype=np.int64)
    return float(wins + wins_and_ties) / (2.0 * low.size * high.size)


def _scores(values: Tensor | np.ndarray) -> np.ndarray:
    array = values.detach().double().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float64)
    return np.where(np.isnan(array), 0.0, array).ravel()
