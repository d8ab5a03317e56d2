"""Metrics of a model on the retain, forget and test rows; every row weighs the same."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hamu.scores import auc
from hamu.training.groups import Group

if TYPE_CHECKING:
    from hamu.tasks.base import Task

SPLITS = ("retain", "forget", "test")


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    *,
    batch_size: int,
    autocast: AbstractContextManager[object],
    group: Group | None = None,
) -> dict[str, float]:
    """Score a model on all three splits.

    Args:
        task: rows and scores.
        model: put into evaluation mode here.
        batch_size: rows a pass.
        autocast: context of the passes.
        group: processes that hold the same model: each scores every so-many-th batch, and all get the metrics that one process
            would have found.

    Returns:
        `{retain,forget,test}_{loss,accuracy,entropy,probability,min_k}` (nats; accuracy, of texts that of answer tokens, and
        probability, the mean of exp(-loss), in [0, 1]) and membership AUCs:
        `retain_forget_loss_auc` = P(forget loss > retain loss), `forget_test_loss_auc` = P(test loss > forget loss),
        `retain_forget_min_k_auc` = P(retain score > forget score), `forget_test_min_k_auc` = P(forget score > test score).
        Splits without rows are left out.
    """
    model.eval()
    group = group or Group.alone(task.device)
    metrics: dict[str, float] = {}
    losses: dict[str, Tensor] = {}
    min_k: dict[str, Tensor] = {}
    for split in SPLITS:
        n_rows = task.n_rows(split)
        if n_rows == 0:
            continue
        batches = task.parts(split, torch.arange(n_rows), batch_size)
        scores = torch.empty(n_rows, 4, dtype=torch.float64, device=task.device)
        for positions in batches[group.rank :: group.size]:
            batch = task.batch(split, positions)
            with autocast:
                rows = task.row_scores(model, batch)
            scores[positions] = torch.stack([rows.loss, rows.min_k, rows.correct.double(), rows.entropy], dim=1)
        if group.size > 1:
            scores = _of_all(scores, batches, group)
        losses[split], min_k[split] = scores[:, 0].cpu(), scores[:, 1].cpu()
        metrics[f"{split}_loss"] = float(losses[split].mean())
        metrics[f"{split}_accuracy"] = float(scores[:, 2].mean())
        metrics[f"{split}_entropy"] = float(scores[:, 3].mean())
        metrics[f"{split}_probability"] = float(torch.exp(-scores[:, 0]).mean())
        metrics[f"{split}_min_k"] = float(scores[:, 1].mean())
    for name, negatives, positives in (("retain_forget", "retain", "forget"), ("forget_test", "forget", "test")):
        if negatives in losses and positives in losses:
            metrics[f"{name}_loss_auc"] = auc(losses[negatives], losses[positives])
            # A low min-k score is a high loss: the roles swap so that both AUCs have the same ideal value.
            metrics[f"{name}_min_k_auc"] = auc(min_k[positives], min_k[negatives])
    return metrics


def _of_all(scores: Tensor, batches: Sequence[Tensor], group: Group) -> Tensor:
    """Put together the rows that each process of a group has scored, shape (n_rows, 4)."""
    positions = [torch.cat([*batches[rank :: group.size], torch.arange(0)]) for rank in range(group.size)]
    gathered = group.gather_rows(scores[positions[group.rank]], [len(part) for part in positions])
    whole = torch.empty_like(scores)
    for part, rows in zip(positions, gathered, strict=True):
        whole[part] = rows
    return whole
