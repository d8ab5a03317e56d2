"""The metrics of TOFU: what a model makes of right, reworded and wrong answers to the same questions.

They need the perturbed files (`PerturbedRows` of `hamu/data/texts.py`), the mean losses of answers, and for two of them more:
the forget quality needs the truth ratios of a model that was trained on the retain rows alone, which such a model's folder keeps
as `truth_ratios.json`; the model utility needs ROUGE-L recalls of generated answers (`hamu/tasks/generation.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hamu.errors import CheckpointError, DataError, unknown
from hamu.hub import one_line
from hamu.models.record import json_text
from hamu.scores import (
    forget_truth_ratio,
    model_utility,
    normalised_probability,
    tofu_forget_quality,
    truth_ratio,
    utility_truth_ratio,
)
from hamu.tasks.tofu_names import PARTS, UTILITY_COLUMNS

if TYPE_CHECKING:
    from hamu.data.texts import PerturbedRows

ScoreLosses = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""(prompts, answers), n of each -> (n,) mean loss of each answer's tokens, nats."""

_NORMALISED = {"real_authors", "world_facts"}  # probability among the options, as these files are multiple choice

TRUTH_RATIOS_NAME = "truth_ratios.json"


def tofu_metrics(
    score_losses: ScoreLosses,
    perturbed: Mapping[str, PerturbedRows],
    *,
    reference: np.ndarray | None = None,
    rouge: Mapping[str, float] | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return TOFU's metrics of one model, and the truth ratio of each question.

    `tofu_<part>_probability` is the mean of exp(-loss) of the true answer, for real authors and world facts divided by itself and
    the wrong answers' together; `tofu_forget_truth_ratio` is the mean of min(R, 1/R), that of the other parts the mean of
    max(0, 1 - R); `tofu_forget_quality` is a p-value, beside its log10; `tofu_model_utility` is the harmonic mean of the nine
    figures of the parts to keep. R averages the wrong answers' losses ("geometric").

    Args:
        score_losses: mean loss of answers to prompts; called once, with each pair once, so that it may batch them by length.
        perturbed: rows by part, of `PARTS`; a part that is not there has no metrics.
        reference: (n_forget,), truth ratios of the retain-only model on the same forget questions (`read_truth_ratios`); without
            them there is no forget quality.
        rouge: mean ROUGE-L recall in [0, 1] of generated answers by part. Without those of the three parts to keep there is no
            model utility: it is left out, not made of fewer figures.

    Returns:
        Metrics by the names of `TOFU_COLUMNS`; and by part the truth ratios, (n,) float64 in the order of the questions. NaN
        where a loss is NaN, and in each figure made of it.

    Raises:
        DataError: a part has another name, or the reference another number of questions.

    Source: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", section 2.2.2.
    """
    rouge = rouge or {}
    for part in (*perturbed, *rouge):
        if part not in PARTS:
            raise DataError(unknown("part of TOFU", part, PARTS))
    if reference is not None and "forget" in perturbed and len(reference) != len(perturbed["forget"].questions):
        raise DataError(
            f"the reference has truth ratios of {len(reference)} questions, but there are {len(perturbed['forget'].questions)} "
            "forget questions; give a retain-only model that was evaluated on the same forget set"
        )
    losses = _losses(score_losses, perturbed)
    metrics: dict[str, float] = {f"tofu_{part}_rouge": float(value) for part, value in rouge.items()}
    ratios: dict[str, np.ndarray] = {}
    for part, rows in perturbed.items():

        def of(answers: Sequence[str], rows: PerturbedRows = rows) -> np.ndarray:
            return np.array([losses[pair] for pair in zip(rows.questions, answers, strict=True)], dtype=np.float64)

        wrong = [
            np.array([losses[question, answer] for answer in answers], dtype=np.float64)
            for question, answers in zip(rows.questions, rows.perturbed, strict=True)
        ]
        right = of(rows.answers)
        chances = normalised_probability(right, wrong) if part in _NORMALISED else np.exp(-right)
        ratios[part] = truth_ratio(of(rows.paraphrased), wrong)
        metrics[f"tofu_{part}_probability"] = float(chances.mean()) if len(chances) else float("nan")
        summary = forget_truth_ratio if part == "forget" else utility_truth_ratio
        metrics[f"tofu_{part}_truth_ratio"] = summary(ratios[part])
    if reference is not None and "forget" in ratios:
        quality, log10 = tofu_forget_quality(ratios["forget"], reference)
        metrics |= {"tofu_forget_quality": quality, "tofu_forget_quality_log10": log10}
    if metrics.keys() >= set(UTILITY_COLUMNS):
        metrics["tofu_model_utility"] = model_utility([metrics[name] for name in UTILITY_COLUMNS])
    return metrics, ratios


def write_truth_ratios(folder: str | Path, ratios: np.ndarray, rows: PerturbedRows) -> None:
    """Write the truth ratios of a model on the forget questions as `truth_ratios.json`, for other models to be compared with.

    Args:
        folder: the model's; made where it is missing.
        ratios: (n,), the truth ratio of each question, in the order of `rows`; NaN and infinite ones are written as null.
        rows: the forget questions.

    Raises:
        DataError: another number of ratios than questions.
    """
    if len(ratios) != len(rows.questions):
        raise DataError(f"there are {len(ratios)} truth ratios of {len(rows.questions)} questions; give one for each")
    record = {
        "questions_sha256": questions_sha256(rows),
        "n_questions": len(rows.questions),
        "averaging": "geometric",
        "forget": [float(ratio) for ratio in ratios],
    }
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=".truth_ratios-", dir=place)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json_text(record, indent=2) + "\n")
        os.chmod(scratch, 0o644)  # a temporary file is the owner's alone
        os.replace(scratch, place / TRUTH_RATIOS_NAME)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def read_truth_ratios(folder: str | Path, rows: PerturbedRows) -> np.ndarray:
    """Return the truth ratios that `write_truth_ratios` left in a retain-only model's folder.

    Args:
        folder: the model's.
        rows: the forget questions that the ratios must be of.

    Returns:
        (n,), float64, all finite, in the order of `rows`.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or a question has no finite ratio.
        DataError: it is of other questions, or of other paraphrased or wrong answers to them.
    """
    path = Path(folder) / TRUTH_RATIOS_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found, known = record["questions_sha256"], record["forget"]
        ratios = np.array([float("nan") if ratio is None else float(ratio) for ratio in known], dtype=np.float64)
    except FileNotFoundError:
        raise CheckpointError(
            f"no {TRUTH_RATIOS_NAME} in {str(folder)!r}: the reference must be a retain-only model that was evaluated with "
            "TOFU's metrics; evaluate it with --eval_tofu first"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read {str(path)!r} ({type(error).__name__}: {one_line(error)}); evaluate the retain-only model again"
        ) from error
    if found != questions_sha256(rows) or len(ratios) != len(rows.questions):
        raise DataError(
            f"{str(path)!r} is of {len(ratios)} other questions than the {len(rows.questions)} forget questions here; give the "
            "retain-only model of this forget set"
        )
    if not np.isfinite(ratios).all():
        raise CheckpointError(
            f"{str(path)!r} has no finite truth ratio for question {int(np.argmin(np.isfinite(ratios)))} of {len(ratios)}; a "
            "model that diverged is no reference: train the retain-only model again"
        )
    return ratios


def questions_sha256(rows: PerturbedRows) -> str:
    """Return the SHA-256 of all that truth ratios are made of: questions, paraphrased answers and wrong ones, in order."""
    texts = [list(rows.questions), list(rows.paraphrased), [list(answers) for answers in rows.perturbed]]
    return hashlib.sha256(json.dumps(texts).encode("ascii")).hexdigest()


def _losses(score_losses: ScoreLosses, perturbed: Mapping[str, PerturbedRows]) -> dict[tuple[str, str], float]:
    """Score each (question, answer) once: an answer that serves as its own paraphrase costs one pass, not two."""
    pairs: dict[tuple[str, str], None] = {}
    for rows in perturbed.values():
        for question, right, reworded, wrong in zip(rows.questions, rows.answers, rows.paraphrased, rows.perturbed, strict=True):
            pairs.update(dict.fromkeys((question, answer) for answer in (right, reworded, *wrong)))
    if not pairs:
        return {}
    questions, answers = zip(*pairs, strict=True)
    losses = np.asarray(score_losses(questions, answers), dtype=np.float64)
    if losses.shape != (len(pairs),):
        raise ValueError(f"{len(pairs)} answers were scored with an array of shape {losses.shape}; give one mean loss for each")
    return dict(zip(pairs, losses.tolist(), strict=True))
