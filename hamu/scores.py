"""Scores of a model on rows and on tokens, AUC of a membership test, and the figures that TOFU makes of losses.

Pure functions. Half-precision logits are scored in float32; the sums over rows are the caller's, in float64. What is made of
questions keeps one value a question, in their order: NaN where a question has none, and a figure over questions with a NaN
among them, or over none at all, is NaN. Nothing is left out in silence, so values never move to another question.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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


CHUNK_ELEMENTS = 2**24
"""Logits that `token_scores` works on at a time: 64 MiB in float32, of which it holds three copies at most."""


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of tokens, each predicted at one position; (m,) each, on the logits' device."""

    logprob: Tensor
    """log p(label), nats, at most 0; float32 or float64."""
    correct: Tensor
    """1 where the largest logit is the label's, else 0; float64."""
    entropy: Tensor
    """Of the model's distribution at the position, nats; as `logprob`."""


@torch.no_grad()
def token_scores(logits: Tensor, labels: Tensor, *, chunk_elements: int = CHUNK_ELEMENTS) -> TokenScores:
    """Score tokens without a graph, some labels at a time, so that no second copy of all logits is ever made.

    Args:
        logits: (m, vocabulary), any float type.
        labels: (m,), int64 in [0, vocabulary).
        chunk_elements: logits that are worked on at a time, at least one label's; it changes the memory, not the scores.

    Returns:
        m scores, from one log-softmax in float32 (float64 for float64 logits); NaN where a logit is NaN.
    """
    n_labels, vocabulary = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logprob, entropy = (torch.empty(n_labels, dtype=dtype, device=logits.device) for _ in range(2))
    correct = torch.empty(n_labels, dtype=torch.float64, device=logits.device)
    size = max(1, chunk_elements // max(1, vocabulary))
    for start in range(0, n_labels, size):
        part = slice(start, start + size)
        log_probs = torch.log_softmax(logits[part], dim=-1, dtype=dtype)
        logprob[part] = log_probs.gather(-1, labels[part, None])[:, 0]
        correct[part] = correct_rows(logits[part], labels[part])
        probs = log_probs.exp_()
        entropy[part] = torch.special.entr(probs, out=probs).sum(dim=-1)
    return TokenScores(logprob, correct, entropy)


def mean_by_row(values: Tensor, row_of: Tensor, n_rows: int) -> Tensor:
    """Return the mean of each row's values, added up in float64, and in the same order on every device.

    Args:
        values: (m,), one a token, any type.
        row_of: (m,), int64 in [0, n_rows), the row of each; in any order.
        n_rows: number of rows.

    Returns:
        (n_rows,), float64; NaN for a row without a value.
    """
    table, valid = _by_row(values, row_of, n_rows)
    return table.sum(dim=-1) / valid.sum(dim=-1)


def min_k_by_row(logprob: Tensor, row_of: Tensor, n_rows: int, k_pct: float) -> Tensor:
    """Return the mean of each row's lowest log-probabilities, as `min_k`, of tokens in one line.

    Args:
        logprob: (m,), log-probability of each label.
        row_of: (m,), int64 in [0, n_rows), the row of each; in any order.
        n_rows: number of rows.
        k_pct: share of a row's labels, in (0, 1].

    Returns:
        (n_rows,), nats, at most 0, float64; NaN for a row without a label.
    """
    table, valid = _by_row(logprob, row_of, n_rows)
    return min_k(table, valid, k_pct)


def _by_row(values: Tensor, row_of: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Lay values (m,) out as a table (n_rows, most values of a row) float64, 0 where none is, and say where one is."""
    counts = torch.bincount(row_of, minlength=n_rows)
    order = torch.argsort(row_of, stable=True)
    rows = row_of[order]
    columns = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    width = int(counts.max()) if n_rows else 0
    table = torch.zeros(n_rows, width, dtype=torch.float64, device=values.device)
    table[rows, columns] = values[order].double()  # each place is written once: no order of additions to chance
    return table, torch.arange(width, device=values.device) < counts[:, None]


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


Averaging = Literal["geometric", "arithmetic"]


def truth_ratio(
    paraphrased_loss: np.ndarray, perturbed_losses: Sequence[np.ndarray] | np.ndarray, *, averaging: Averaging = "geometric"
) -> np.ndarray:
    """Return R = P(wrong) / P(correct) of each question, P being a token's probability, exp(-mean loss of the answer).

    P(correct) is that of the paraphrased answer, P(wrong) the mean over the wrong answers: the geometric one, exp(-mean of
    their losses), or the arithmetic one of their P. Above 1 the model finds the wrong answers likelier.

    Args:
        paraphrased_loss: (n,), mean loss of the right answer's tokens, nats.
        perturbed_losses: the same of the wrong answers of each question: n rows, which may differ in length.
        averaging: "geometric", as today's tables; "arithmetic", as TOFU's own model utility.

    Returns:
        (n,), in [0, inf], float64; NaN where a loss is NaN or a question has no wrong answer.

    Source: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", section 2.2.2; the geometric mean is OpenUnlearning's.
    """
    right = np.asarray(paraphrased_loss, dtype=np.float64)
    wrong, question_of, counts = _flat(perturbed_losses, len(right))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if averaging == "geometric":
            return np.exp(right - np.bincount(question_of, wrong, len(right)) / counts)
        return np.bincount(question_of, np.exp(right[question_of] - wrong), len(right)) / counts


def forget_truth_ratio(ratios: np.ndarray) -> float:
    """Return the mean of min(R, 1/R) over the truth ratios (n,) of the forget questions: in [0, 1], 1 where nothing is known."""
    with np.errstate(divide="ignore"):
        return _mean(np.minimum(ratios, 1.0 / np.asarray(ratios, dtype=np.float64)))


def utility_truth_ratio(ratios: np.ndarray) -> float:
    """Return the mean of max(0, 1 - R) over the truth ratios (n,) of questions to keep: in [0, 1], higher is better."""
    return _mean(np.maximum(0.0, 1.0 - np.asarray(ratios, dtype=np.float64)))


def normalised_probability(correct_loss: np.ndarray, wrong_losses: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Return p / (p + sum of the wrong answers' p) of each question, p = exp(-mean loss of the answer's tokens).

    It is computed from differences of losses, so that it holds where each p is too small for a float.

    Args:
        correct_loss: (n,), mean loss of the right answer's tokens, nats.
        wrong_losses: the same of the wrong answers of each question: n rows, which may differ in length.

    Returns:
        (n,), in [0, 1], float64; NaN where a loss is NaN or a question has no wrong answer.
    """
    right = np.asarray(correct_loss, dtype=np.float64)
    wrong, question_of, counts = _flat(wrong_losses, len(right))
    with np.errstate(over="ignore", invalid="ignore"):
        odds = np.bincount(question_of, np.exp(right[question_of] - wrong), len(right))
    return np.where(counts > 0, 1.0 / (1.0 + odds), np.nan)


LOG10_FLOOR = math.log10(sys.float_info.min)
"""About -307.65: what log10 of a p-value is called where the p-value is smaller still, or too small for a float."""


def tofu_forget_quality(ratios: np.ndarray, reference_ratios: np.ndarray) -> tuple[float, float]:
    """Return the p-value of a two-sided Kolmogorov-Smirnov test between truth ratios of two models, and its log10.

    Above 0.05 the model cannot be told from one that never saw the forget rows. Only the order of the ratios counts.

    Args:
        ratios: (n,), R of the forget questions by the model.
        reference_ratios: (m,), by the model that was trained on the retain rows alone.

    Returns:
        The p-value in [0, 1], and log10 of it, at least `LOG10_FLOOR`; NaN twice where a ratio is NaN or a side is empty.

    Source: Maini et al., "TOFU", section 2.2.2 (forget quality).
    """
    sides = [np.asarray(side, dtype=np.float64).ravel() for side in (ratios, reference_ratios)]
    if any(side.size == 0 or np.isnan(side).any() for side in sides):
        return float("nan"), float("nan")
    from scipy.stats import ks_2samp  # 0.5 s that other runs need not wait for

    p_value = float(ks_2samp(*sides).pvalue)
    return p_value, math.log10(max(p_value, sys.float_info.min))


def model_utility(parts: Sequence[float]) -> float:
    """Return the harmonic mean of figures in [0, 1]: 0 where one is 0, NaN where one is NaN or there is none.

    TOFU's model utility is that of nine: {retain, real authors, world facts} x {probability, ROUGE-L recall, truth ratio}.

    Source: Maini et al., "TOFU", section 2.2.2 (model utility).
    """
    values = np.asarray(parts, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return 1.0 / _mean(1.0 / values)


def _flat(rows: Sequence[np.ndarray] | np.ndarray, n_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put rows of values one after another: the values, the row of each, the number of each row."""
    if len(rows) != n_rows:
        raise ValueError(f"{n_rows} questions, but the wrong answers of {len(rows)}; give one row of losses a question")
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    values = np.concatenate([np.empty(0), *(np.asarray(row, dtype=np.float64) for row in rows)])
    return values, np.repeat(np.arange(n_rows), counts), counts


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if np.size(values) else float("nan")
