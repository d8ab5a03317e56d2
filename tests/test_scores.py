"""Scores against golden numbers of the published implementation, and against their definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hamu.scores import auc, correct_rows, cross_entropy_rows, entropy_rows, min_k

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "golden_data.json").read_text())["cases"]
ARRAYS = np.load(DATA / "golden_data.npz")
RELATIVE = {"f64": 1e-9, "f32": 2e-5}  # the golden file's own tolerance hints


def cases(group: str, prefix: str = "") -> list[Any]:
    found = [case for case in GOLDEN if case["group"] == group and case["name"].startswith(prefix)]
    return [pytest.param(case, id=f"{case['name']}-{case['dtype']}") for case in found]


def array(case: dict[str, Any], name: str) -> np.ndarray:
    return ARRAYS[f"{case['arrays']}/{name}"]


@pytest.mark.parametrize("case", cases("metrics", "vision"))
def test_vision_metrics_equal_golden(case: dict[str, Any]) -> None:
    logits, labels = torch.tensor(array(case, "logits")), torch.tensor(array(case, "labels"))
    tolerance = RELATIVE[case["dtype"]]
    assert correct_rows(logits, labels).mean().item() == pytest.approx(case["expected"]["accuracy"], rel=tolerance, abs=0)
    assert entropy_rows(logits).mean().item() == pytest.approx(case["expected"]["entropy"], rel=tolerance, abs=0)
    assert cross_entropy_rows(logits, labels).numpy() == pytest.approx(array(case, "mean_losses"), rel=tolerance, abs=0)


@pytest.mark.parametrize("case", cases("metrics", "llm"))
def test_min_k_and_mean_losses_of_tokens_equal_golden(case: dict[str, Any]) -> None:
    logits = torch.tensor(array(case, "logits"))[:, :-1]
    labels = torch.tensor(array(case, "labels"))[:, 1:]  # a position predicts the next token
    valid = labels != -100
    logprobs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    tolerance = RELATIVE[case["dtype"]]
    got = min_k(logprobs, valid, case["params"]["k_pct"]).numpy()
    assert got == pytest.approx(array(case, "min_k_logprobs"), rel=tolerance, abs=0, nan_ok=True)
    assert got == pytest.approx(np.array(case["expected"]["min_k"], dtype=float), rel=tolerance, abs=0, nan_ok=True)
    rows = cross_entropy_rows(logits.flatten(0, 1), labels.clamp(min=0).flatten()).view_as(labels)
    losses = rows.where(valid, 0.0).sum(-1) / valid.sum(-1).clamp(min=1)
    assert losses.numpy() == pytest.approx(array(case, "mean_losses"), rel=tolerance, abs=0)


@pytest.mark.parametrize("case", cases("auc"))
def test_auc_equals_golden(case: dict[str, Any]) -> None:
    retain, forget, test = (array(case, f"{split}_losses") for split in ("retain", "forget", "test"))
    expected = case["expected"]
    close = {"rel": 1e-12, "abs": 0}  # counts of pairs: only the last division rounds
    assert auc(retain, forget) == pytest.approx(expected["retain_forget_losses_auc"], **close)
    assert auc(forget, test) == pytest.approx(expected["forget_test_losses_auc"], **close)
    # by min-k: a lower score is a higher loss, so the roles swap
    assert auc(-forget, -retain) == pytest.approx(expected["retain_forget_min_k_logprobs_auc"], **close)
    assert auc(-test, -forget) == pytest.approx(expected["forget_test_min_k_logprobs_auc"], **close)


def test_auc_counts_pairs_and_halves_ties() -> None:
    rng = np.random.default_rng(0)
    low, high = rng.integers(0, 6, 40).astype(float), rng.integers(0, 6, 25).astype(float)
    pairs = np.sign(high[:, None] - low[None, :])
    assert auc(torch.tensor(low), torch.tensor(high)) == pytest.approx((pairs + 1).mean() / 2, rel=1e-12, abs=0)


def test_auc_of_infinite_losses_is_an_order_like_any_other() -> None:
    assert auc(np.array([0.0, 1.0]), np.array([np.inf, np.inf])) == 1.0
    assert auc(np.array([np.inf]), np.array([np.inf])) == 0.5


def test_auc_without_one_side_is_nan() -> None:
    assert math.isnan(auc(np.empty(0), np.ones(3)))
    assert math.isnan(auc(torch.ones(3), torch.empty(0)))


def test_entropy_of_certain_and_uniform_logits() -> None:
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf], [2.0, 2.0, 2.0]])
    assert entropy_rows(logits).tolist() == pytest.approx([0.0, math.log(3)], abs=1e-6)  # float32


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([0, 1, 2, 3])
    assert cross_entropy_rows(logits, labels).dtype == torch.float32
    assert torch.equal(cross_entropy_rows(logits, labels), cross_entropy_rows(logits.float(), labels))
    assert torch.equal(entropy_rows(logits), entropy_rows(logits.float()))


def test_a_row_is_correct_where_its_largest_logit_is_the_labels() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0], [3.0, 2.0, 1.0], [-5.0, -4.0, -3.0]])
    assert correct_rows(logits, torch.tensor([1, 2, 2])).tolist() == [1.0, 0.0, 1.0]
    assert correct_rows(logits[:0], torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_min_k_takes_k_in_float32_and_at_least_one() -> None:
    logprobs = -torch.arange(1.0, 101.0)[None]
    valid = torch.ones(1, 100, dtype=torch.bool)
    assert min_k(logprobs, valid, 0.29).item() == pytest.approx(-sum(range(72, 101)) / 29)  # float64 would give k = 28
    assert min_k(logprobs, valid, 0.001).item() == -100.0
