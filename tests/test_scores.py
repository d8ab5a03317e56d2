"""Scores against golden numbers of the published implementation, and against their definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import hmean

from hamu.scores import (
    LOG10_FLOOR,
    auc,
    correct_rows,
    cross_entropy_rows,
    entropy_rows,
    forget_truth_ratio,
    mean_by_row,
    min_k,
    min_k_by_row,
    model_utility,
    normalised_probability,
    tofu_forget_quality,
    token_scores,
    truth_ratio,
    utility_truth_ratio,
)

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


def tokens(n_labels: int = 23, vocabulary: int = 11, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(n_labels, vocabulary, generator=generator)
    return logits.to(dtype), torch.randint(vocabulary, (n_labels,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scores_of_tokens_equal_those_of_rows(dtype: torch.dtype) -> None:
    logits, labels = tokens(dtype=dtype)
    got = token_scores(logits, labels, chunk_elements=50)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.logprob.dtype == got.entropy.dtype == wide
    close = {"rtol": 0, "atol": 1e-5 if wide == torch.float32 else 1e-13}  # sums of 11 terms of at most 20, rounded in `wide`
    torch.testing.assert_close(got.logprob, -cross_entropy_rows(logits, labels), **close)
    torch.testing.assert_close(got.entropy, entropy_rows(logits), **close)
    assert torch.equal(got.correct, correct_rows(logits, labels))
    assert 0 < got.correct.sum() < len(labels)


def test_scores_of_tokens_do_not_depend_on_the_chunks() -> None:
    logits, labels = tokens()
    whole = token_scores(logits, labels)
    for chunk_elements in (0, 1, 11, 12, 22, 100, 252, 253):
        part = token_scores(logits, labels, chunk_elements=chunk_elements)
        assert torch.equal(part.logprob, whole.logprob)
        assert torch.equal(part.correct, whole.correct)
        # one row alone may be summed in another order than as one of many: 11 terms of at most 0.4
        torch.testing.assert_close(part.entropy, whole.entropy, rtol=0, atol=1e-6)


def test_scores_of_tokens_leave_the_logits_as_they_are_and_keep_no_graph() -> None:
    logits, labels = tokens()
    before = logits.clone()
    got = token_scores(logits.requires_grad_(), labels)
    assert torch.equal(logits, before)
    assert not got.logprob.requires_grad and not got.entropy.requires_grad


def test_scores_of_certain_tokens_and_of_none() -> None:
    certain = token_scores(torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]]), torch.tensor([0, 1]))
    assert certain.logprob.tolist() == [0.0, -torch.inf]
    assert certain.entropy.tolist() == [0.0, 0.0]
    assert certain.correct.tolist() == [1.0, 0.0]
    broken = token_scores(torch.tensor([[torch.nan, 0.0], [0.0, 0.0]]), torch.tensor([1, 1]))
    assert broken.logprob.isnan().tolist() == broken.entropy.isnan().tolist() == [True, False]
    none = token_scores(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
    assert none.logprob.shape == none.correct.shape == none.entropy.shape == (0,)


def test_means_and_min_k_by_row_equal_a_loop_over_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 40, 7, 100, 0, 3]
    row_of = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))
    for order in (torch.arange(len(row_of)), torch.randperm(len(row_of), generator=generator)):
        values = -torch.rand(len(row_of), generator=generator).double()
        rows = [values[row_of[order] == row] for row in range(6)]
        means = mean_by_row(values, row_of[order], 6)
        assert means.tolist() == pytest.approx([row.mean().item() for row in rows], rel=1e-14, nan_ok=True)  # 100 terms
        for k_pct in (0.01, 0.1, 0.29, 1.0):
            expected = []
            for row in rows:
                k = max(1, int(np.float32(k_pct) * np.float32(len(row))))
                expected.append(row.sort().values[:k].mean().item())
            got = min_k_by_row(values, row_of[order], 6, k_pct)
            assert got.tolist() == pytest.approx(expected, rel=1e-14, nan_ok=True)
    assert means.dtype == torch.float64
    assert math.isnan(means[4]) and math.isnan(got[4])  # the row without a token, and it alone
    assert means.isnan().sum() == got.isnan().sum() == 1


def test_min_k_by_row_follows_the_rule_of_min_k() -> None:
    logprob, row_of = -torch.arange(1.0, 101.0), torch.zeros(100, dtype=torch.int64)
    assert min_k_by_row(logprob, row_of, 1, 0.29).item() == pytest.approx(-sum(range(72, 101)) / 29)  # float64 would give k = 28
    single = torch.tensor([-0.5, -2.0])
    assert torch.equal(min_k_by_row(single, torch.tensor([0, 1]), 2, 0.1), single.double())  # of one label: minus its loss


def test_means_by_row_of_no_rows_and_of_float32_values() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    assert mean_by_row(torch.empty(0), empty, 0).shape == (0,)
    assert mean_by_row(torch.empty(0), empty, 2).isnan().all()
    assert min_k_by_row(torch.empty(0), empty, 2, 0.5).isnan().all()
    small = torch.tensor([1.0, 1e8, -1e8, 1.0])  # float32 sums would lose the ones
    assert mean_by_row(small, torch.tensor([0, 0, 0, 0]), 1).item() == 0.5


LN = math.log


def test_truth_ratio_by_hand() -> None:
    right = np.array([-LN(0.5), -LN(0.1)])
    wrong = [[-LN(0.2), -LN(0.8)], [-LN(0.4)]]
    assert truth_ratio(right, wrong) == pytest.approx([0.4 / 0.5, 0.4 / 0.1])  # sqrt(0.2 * 0.8) = 0.4
    assert truth_ratio(right, wrong, averaging="arithmetic") == pytest.approx([0.5 / 0.5, 0.4 / 0.1])
    one_wrong = np.array([[1.0], [2.0]])  # as a table; of one wrong answer both means are the same
    assert truth_ratio(right, one_wrong) == pytest.approx(truth_ratio(right, one_wrong, averaging="arithmetic"))


def test_truth_ratio_is_one_where_wrong_answers_are_as_likely_as_right_ones() -> None:
    losses = np.array([0.0, 1.5, 700.0])
    for averaging in ("geometric", "arithmetic"):
        assert truth_ratio(losses, np.repeat(losses[:, None], 5, axis=1), averaging=averaging).tolist() == [1.0, 1.0, 1.0]


def test_arithmetic_truth_ratio_is_never_below_the_geometric_one() -> None:
    rng = np.random.default_rng(0)
    right, wrong = rng.random(50) * 4, rng.random((50, 5)) * 4
    assert (truth_ratio(right, wrong, averaging="arithmetic") >= truth_ratio(right, wrong)).all()


def test_a_question_that_cannot_be_scored_is_nan_and_moves_no_other() -> None:
    right = np.array([1.0, np.nan, 1.0, 1.0, 1.0])
    wrong: list[list[float]] = [[2.0], [2.0], [], [np.nan, 2.0], [3.0, 3.0]]
    for averaging in ("geometric", "arithmetic"):
        got = truth_ratio(right, wrong, averaging=averaging)
        assert got == pytest.approx([math.exp(-1), math.nan, math.nan, math.nan, math.exp(-2)], nan_ok=True)
    chances = normalised_probability(right, wrong)
    assert np.isnan(chances).tolist() == [False, True, True, True, False]
    with pytest.raises(ValueError, match="2 questions, but the wrong answers of 1"):
        truth_ratio(np.ones(2), [[1.0]])


def test_truth_ratio_of_a_model_that_broke_down_is_infinite_or_zero_and_its_summaries_are_finite() -> None:
    ratios = truth_ratio(np.array([5000.0, 0.0]), [[0.0], [5000.0]])
    assert ratios.tolist() == [np.inf, 0.0]
    assert forget_truth_ratio(ratios) == 0.0
    assert utility_truth_ratio(ratios) == 0.5


def test_summaries_of_truth_ratios_by_hand() -> None:
    ratios = np.array([0.25, 4.0, 1.0, 0.8])
    assert forget_truth_ratio(ratios) == pytest.approx((0.25 + 0.25 + 1.0 + 0.8) / 4)
    assert utility_truth_ratio(ratios) == pytest.approx((0.75 + 0.0 + 0.0 + 0.2) / 4)
    for summary in (forget_truth_ratio, utility_truth_ratio):
        assert math.isnan(summary(np.empty(0)))
        assert math.isnan(summary(np.array([0.5, np.nan])))


def test_normalised_probability_by_hand() -> None:
    right, wrong = -np.log([0.5, 0.2]), [-np.log([0.25, 0.25]), -np.log([0.2, 0.3, 0.3])]
    assert normalised_probability(right, wrong) == pytest.approx([0.5, 0.2])
    far = normalised_probability(right + 2000.0, [row + 2000.0 for row in wrong])  # each p is 0 in float64
    assert far == pytest.approx([0.5, 0.2], rel=1e-9)  # losses of 2000 carry an error of 2e-13
    assert normalised_probability(np.array([0.0, 5000.0]), [[5000.0], [0.0]]).tolist() == [1.0, 0.0]


def test_forget_quality_is_one_on_identical_ratios_and_takes_no_notice_of_monotone_transforms() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random(40), rng.random(40) ** 1.3
    assert tofu_forget_quality(first, first) == (1.0, 0.0)
    assert tofu_forget_quality(first, rng.permutation(first)) == (1.0, 0.0)
    p_value, log10 = tofu_forget_quality(first, second)
    assert 0 < p_value < 1 and log10 == pytest.approx(math.log10(p_value))
    assert tofu_forget_quality(np.log(first), np.log(second)) == (p_value, log10)


@pytest.mark.parametrize("n_rows", [3, 40, 200, 400])
def test_forget_quality_of_separate_ratios_is_two_of_all_arrangements(n_rows: int) -> None:
    """Of the C(2n, n) equally likely orders of two samples, two have one sample wholly below the other.

    At n = 200 and 400 that is 1.9e-119 and 1.1e-239, the figures that broken models have in the tables of forget05 and forget10.
    """
    low, high = np.linspace(0, 1, n_rows), np.linspace(2, 3, n_rows)
    p_value, log10 = tofu_forget_quality(low, high)
    expected = LN(2) - (math.lgamma(2 * n_rows + 1) - 2 * math.lgamma(n_rows + 1))
    assert log10 == pytest.approx(expected / LN(10), rel=1e-9)  # a recursion over 2n steps
    assert tofu_forget_quality(high, low)[0] == p_value
    high[0] = np.inf
    assert tofu_forget_quality(low, high)[0] == p_value


def test_forget_quality_too_small_for_a_float_has_a_finite_log10() -> None:
    p_value, log10 = tofu_forget_quality(np.linspace(0, 1, 1000), np.linspace(2, 3, 1000))  # log10 is -599.9
    assert p_value == 0.0
    assert log10 == LOG10_FLOOR and -308 < LOG10_FLOOR < -307


def test_forget_quality_with_a_missing_ratio_or_side_is_nan() -> None:
    for side in (np.empty(0), np.array([0.5, np.nan])):
        for pair in ((side, np.ones(3)), (np.ones(3), side)):
            assert all(math.isnan(value) for value in tofu_forget_quality(*pair))


def test_model_utility_is_the_harmonic_mean_and_zero_where_a_part_is() -> None:
    parts = [0.9, 0.5, 0.4, 0.7, 0.8, 0.6, 0.3, 0.2, 1.0]
    assert model_utility(parts) == pytest.approx(hmean(parts), rel=1e-14)  # nine terms
    assert model_utility([0.5] * 9) == 0.5
    assert model_utility([*parts, 0.0]) == 0.0
    assert math.isnan(model_utility([*parts, math.nan])) and math.isnan(model_utility([0.0, math.nan]))
    assert math.isnan(model_utility([]))
