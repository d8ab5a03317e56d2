"""TOFU's metrics of losses that are known, by hand, and the file that a reference is read from."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hamu.data.texts import PerturbedRows
from hamu.errors import CheckpointError, DataError
from hamu.scores import tofu_forget_quality
from hamu.tasks.tofu import TRUTH_RATIOS_NAME, read_truth_ratios, tofu_metrics, write_truth_ratios
from hamu.tasks.tofu_names import PARTS, TOFU_COLUMNS

ROUGE = {"forget": 0.9, "retain": 0.8, "real_authors": 0.5, "world_facts": 0.4}


def make_rows(part: str = "forget", n_rows: int = 3, n_wrong: int = 2, *, paraphrased: bool = True) -> PerturbedRows:
    answers = tuple(f"{part} answer {row}" for row in range(n_rows))
    return PerturbedRows(
        questions=tuple(f"{part} question {row}?" for row in range(n_rows)),
        answers=answers,
        paraphrased=tuple(f"{part} reworded {row}" for row in range(n_rows)) if paraphrased else answers,
        perturbed=tuple(tuple(f"{part} wrong {row} {number}" for number in range(n_wrong)) for row in range(n_rows)),
    )


def make_parts() -> dict[str, PerturbedRows]:
    kept = {part: make_rows(part, n_wrong=3, paraphrased=False) for part in ("real_authors", "world_facts")}
    return {"forget": make_rows(), "retain": make_rows("retain", 4), **kept}


class Scorer:
    """Losses drawn at the first sight of a pair, and what was asked for."""

    def __init__(self, losses: dict[tuple[str, str], float] | None = None) -> None:
        self.losses = {} if losses is None else losses
        self.calls: list[list[tuple[str, str]]] = []
        self._rng = np.random.default_rng(0)

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        self.calls.append(list(zip(prompts, answers, strict=True)))
        return np.array([self.losses.setdefault(pair, float(self._rng.uniform(0.1, 3))) for pair in self.calls[-1]])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def test_metrics_equal_a_loop_over_questions() -> None:
    parts, score = make_parts(), Scorer()
    reference = np.array([0.5, 1.5, 0.9])
    metrics, ratios = tofu_metrics(score, parts, reference=reference, rouge=ROUGE)
    expected: dict[str, float] = {f"tofu_{part}_rouge": value for part, value in ROUGE.items()}
    for part, rows in parts.items():
        chances, summaries = [], []
        for row, question in enumerate(rows.questions):
            wrong = [score.losses[question, answer] for answer in rows.perturbed[row]]
            right = math.exp(-score.losses[question, rows.answers[row]])
            ratio = math.exp(-mean(wrong)) / math.exp(-score.losses[question, rows.paraphrased[row]])
            assert ratios[part][row] == pytest.approx(ratio, rel=1e-12)
            options = part in ("real_authors", "world_facts")
            chances.append(right / (right + sum(math.exp(-loss) for loss in wrong)) if options else right)
            summaries.append(min(ratio, 1 / ratio) if part == "forget" else max(0.0, 1 - ratio))
        expected[f"tofu_{part}_probability"] = mean(chances)
        expected[f"tofu_{part}_truth_ratio"] = mean(summaries)
    nine = [expected[f"tofu_{part}_{what}"] for part in PARTS[1:] for what in ("probability", "rouge", "truth_ratio")]
    expected["tofu_model_utility"] = 9 / sum(1 / value for value in nine)
    expected["tofu_forget_quality"], expected["tofu_forget_quality_log10"] = tofu_forget_quality(ratios["forget"], reference)
    assert metrics == pytest.approx(expected, rel=1e-12)  # sums of a few terms
    assert set(metrics) == set(TOFU_COLUMNS)


def test_each_answer_to_a_question_is_scored_once_in_one_call() -> None:
    parts, score = make_parts(), Scorer()
    tofu_metrics(score, parts)
    (pairs,) = score.calls
    assert len(pairs) == len(set(pairs)) == 3 * (2 + 2) + 4 * (2 + 2) + 2 * 3 * (1 + 3)


def test_a_model_that_equals_its_reference_has_forget_quality_one() -> None:
    parts, score = make_parts(), Scorer()
    _, ratios = tofu_metrics(score, parts)
    metrics, _ = tofu_metrics(score, parts, reference=ratios["forget"])
    assert metrics["tofu_forget_quality"] == 1.0 and metrics["tofu_forget_quality_log10"] == 0.0


def test_what_needs_more_than_losses_is_left_out_without_it() -> None:
    metrics, _ = tofu_metrics(Scorer(), make_parts())
    assert set(TOFU_COLUMNS) - set(metrics) == {
        *("tofu_forget_quality", "tofu_forget_quality_log10", "tofu_model_utility"),
        *(f"tofu_{part}_rouge" for part in PARTS),
    }
    for left_out in ("retain", "real_authors", "world_facts"):
        some = {part: value for part, value in ROUGE.items() if part != left_out}
        assert "tofu_model_utility" not in tofu_metrics(Scorer(), make_parts(), rouge=some)[0]
    without_forget = {part: value for part, value in ROUGE.items() if part != "forget"}
    assert "tofu_model_utility" in tofu_metrics(Scorer(), make_parts(), rouge=without_forget)[0]


def test_parts_that_are_not_there_have_no_metrics() -> None:
    metrics, ratios = tofu_metrics(Scorer(), {"forget": make_rows()})
    assert set(metrics) == {"tofu_forget_probability", "tofu_forget_truth_ratio"} and set(ratios) == {"forget"}
    assert tofu_metrics(Scorer(), {}) == ({}, {})
    metrics, ratios = tofu_metrics(Scorer(), {"retain": make_rows(n_rows=0)})
    assert math.isnan(metrics["tofu_retain_probability"]) and ratios["retain"].shape == (0,)


def test_model_utility_is_zero_where_no_generated_answer_holds_a_word() -> None:
    metrics, _ = tofu_metrics(Scorer(), make_parts(), rouge={**ROUGE, "world_facts": 0.0})
    assert metrics["tofu_model_utility"] == 0.0


def test_a_loss_that_is_nan_makes_its_own_question_nan_and_no_other() -> None:
    rows = make_rows(n_rows=4)
    losses = {(rows.questions[1], rows.perturbed[1][0]): math.nan}
    metrics, ratios = tofu_metrics(Scorer(losses), {"forget": rows}, reference=np.ones(4))
    assert np.isnan(ratios["forget"]).tolist() == [False, True, False, False]
    assert math.isnan(metrics["tofu_forget_truth_ratio"]) and math.isnan(metrics["tofu_forget_quality"])
    assert math.isfinite(metrics["tofu_forget_probability"])  # of the answers, which all have a loss


def test_the_same_question_twice_is_two_questions() -> None:
    rows = PerturbedRows(questions=("who?", "who?"), answers=("a", "b"), paraphrased=("a", "b"), perturbed=(("c",), ("d", "c")))
    losses = {("who?", "a"): 1.0, ("who?", "b"): 2.0, ("who?", "c"): 3.0, ("who?", "d"): 5.0}
    metrics, ratios = tofu_metrics(Scorer(losses), {"forget": rows})
    assert ratios["forget"] == pytest.approx([math.exp(1 - 3), math.exp(2 - 4)])
    assert metrics["tofu_forget_probability"] == pytest.approx((math.exp(-1) + math.exp(-2)) / 2)


def test_other_parts_and_a_reference_of_another_length_are_refused() -> None:
    with pytest.raises(DataError, match="unknown part of TOFU 'retian'; did you mean 'retain'"):
        tofu_metrics(Scorer(), {"retian": make_rows()})
    with pytest.raises(DataError, match="unknown part of TOFU 'forgot'"):
        tofu_metrics(Scorer(), {}, rouge={"forgot": 0.1})
    with pytest.raises(DataError, match="truth ratios of 2 questions, but there are 3"):
        tofu_metrics(Scorer(), {"forget": make_rows()}, reference=np.ones(2))
    with pytest.raises(ValueError, match="12 answers were scored with an array of shape"):
        tofu_metrics(lambda prompts, answers: np.ones(5), {"forget": make_rows()})


def test_truth_ratios_come_back_bit_by_bit(tmp_path: Path) -> None:
    rows = make_rows(n_rows=50)
    ratios = np.exp(np.random.default_rng(0).normal(size=50) * 40)
    write_truth_ratios(tmp_path / "model", ratios, rows)
    assert read_truth_ratios(tmp_path / "model", rows).tolist() == ratios.tolist()
    write_truth_ratios(tmp_path / "model", ratios / 2, rows)  # a second evaluation replaces the first
    assert read_truth_ratios(tmp_path / "model", rows).tolist() == (ratios / 2).tolist()
    assert [file.name for file in (tmp_path / "model").iterdir()] == [TRUTH_RATIOS_NAME]


def test_a_reference_of_other_questions_or_answers_is_refused(tmp_path: Path) -> None:
    rows = make_rows()
    write_truth_ratios(tmp_path, np.ones(3), rows)
    turned = {name: tuple(reversed(getattr(rows, name))) for name in ("questions", "answers", "paraphrased", "perturbed")}
    same = {name: getattr(rows, name) for name in turned}
    others = [
        PerturbedRows(**turned),
        *(PerturbedRows(**{**same, name: turned[name]}) for name in ("questions", "paraphrased", "perturbed")),
        make_rows("retain"),
        make_rows(n_rows=2),
    ]
    for other in others:
        with pytest.raises(DataError, match="other questions than the [23] forget questions"):
            read_truth_ratios(tmp_path, other)
    with pytest.raises(DataError, match="2 truth ratios of 3 questions"):
        write_truth_ratios(tmp_path, np.ones(2), rows)


def test_a_reference_that_is_missing_broken_or_diverged_is_refused(tmp_path: Path) -> None:
    rows = make_rows()
    with pytest.raises(CheckpointError, match=r"no truth_ratios.json in .*: the reference must be a retain-only model"):
        read_truth_ratios(tmp_path, rows)
    write_truth_ratios(tmp_path, np.array([1.0, np.nan, np.inf]), rows)
    record: dict[str, Any] = json.loads((tmp_path / TRUTH_RATIOS_NAME).read_text())
    assert record["forget"] == [1.0, None, None]  # one value a question
    with pytest.raises(CheckpointError, match="no finite truth ratio for question 1 of 3"):
        read_truth_ratios(tmp_path, rows)
    for broken in ("{", "[]", "{}", '{"questions_sha256": "", "forget": 3}', '{"questions_sha256": "", "forget": [[]]}'):
        (tmp_path / TRUTH_RATIOS_NAME).write_text(broken)
        with pytest.raises(CheckpointError, match="cannot read .*; evaluate the retain-only model again"):
            read_truth_ratios(tmp_path, rows)
