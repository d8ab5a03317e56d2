"""What is measured of a text model on request, once at the end of a run: ROUGE-L of generated answers, and TOFU's metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hamu.models.language import LanguageModel
from hamu.tasks.generation import generate_answers, rouge_l_recall
from hamu.tasks.tofu import read_truth_ratios, tofu_metrics
from hamu.tasks.tofu_names import PARTS

if TYPE_CHECKING:
    from hamu.tasks.text import TextTask
    from hamu.training.config import TrainConfig

SPLITS = ("retain", "forget", "test")


def extra_metrics_of(config: TrainConfig, task: TextTask) -> Callable[[TextTask, LanguageModel], dict[str, float]]:
    """Make the function that measures what `eval_generation_rows`, `eval_tofu` and `retain_reference` ask for.

    Raises:
        CheckpointError, DataError: what it would need at the end of a run is not there, or does not fit: the reference's truth
            ratios, or rows that are no longer than `max_length`.
    """
    n_rows, batch_size = config.logging.eval_generation_rows, config.training.per_device_eval_batch_size
    perturbed = task.data.perturbed
    reference: np.ndarray | None = None
    if config.logging.retain_reference is not None and "forget" in perturbed:
        reference = read_truth_ratios(Path(config.logging.retain_reference).expanduser(), perturbed["forget"])
    for rows in perturbed.values():
        for answers in (rows.answers, rows.paraphrased, *zip(*(_padded(rows.perturbed)), strict=True)):
            task.encode(rows.questions, answers)

    def measure(task: TextTask, model: LanguageModel) -> dict[str, float]:
        metrics = _rouge_of_splits(task, model, n_rows, batch_size) if n_rows else {}
        if not config.logging.eval_tofu:
            return metrics
        rouge = {
            part: _rouge(task, model, perturbed[part].questions, perturbed[part].answers, n_rows, batch_size)
            for part in (PARTS if n_rows else ())
            if len(perturbed.get(part, ()))
        }
        found, ratios = tofu_metrics(
            lambda prompts, answers: task.losses(model, prompts, answers, batch_size=batch_size),
            perturbed,
            reference=reference,
            rouge=rouge,
        )
        task.truth_ratios = ratios.get("forget")
        return metrics | found

    return measure


def _padded(wrong: Sequence[Sequence[str]]) -> list[list[str]]:
    """The wrong answers of each question, as many of each: the last one again where there are fewer."""
    most = max(map(len, wrong), default=0)
    return [[*answers, *[answers[-1]] * (most - len(answers))] for answers in wrong]


def _rouge_of_splits(task: TextTask, model: LanguageModel, n_rows: int, batch_size: int) -> dict[str, float]:
    """`{retain,forget,test}_rouge`: mean ROUGE-L recall of the answers to the first `n_rows` questions of a split."""
    found = {}
    for split in SPLITS:
        rows = getattr(task.data, split)
        asked = [number for number, prompt in enumerate(rows.prompts) if prompt]  # a plain text has no question
        if asked:
            prompts, answers = [rows.prompts[i] for i in asked], [rows.responses[i] for i in asked]
            found[f"{split}_rouge"] = _rouge(task, model, prompts, answers, n_rows, batch_size)
    return found


def _rouge(
    task: TextTask, model: LanguageModel, prompts: Sequence[str], answers: Sequence[str], n_rows: int, batch_size: int
) -> float:
    generated = generate_answers(
        model.net,
        task.tokenizer,
        list(prompts[:n_rows]),
        batch_size=batch_size,
        pad_id=task.pad_id,
        max_length=task.max_length,
        chat=task.chat,
    )
    return float(np.mean(rouge_l_recall(generated, list(answers[:n_rows]))))
