"""Metrics of a model on the retain, forget and test rows; every row weighs the same."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hamu.scores import auc

if TYPE_CHECKING:
    from hamu.tasks.base import Task

SPLITS = ("retain", "forget", "test")


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, *, batch_size: int, autocast: AbstractContextManager[object]) -> dict[str, float]:
    """Score a model on all three splits.

    Args:
        task: rows and scores.
        model: put into evaluation mode here.
        batch_size: rows a pass.
        autocast: context of the passes.

    Returns:
        `{retain,forget,test}_{loss,accuracy,entropy}` (nats; accuracy in [0, 1]) and membership AUCs:
        `retain_forget_loss_auc` = P(forget loss > retain loss), `forget_test_loss_auc` = P(test loss > forget loss),
        `retain_forget_min_k_auc` = P(retain score > forget score), `forget_test_min_k_auc` = P(forget score > test score).
        Splits without rows are left out.
    """
    model.eval()
    metrics: dict[str, float] = {}
    losses: dict[str, Tensor] = {}
    min_k: dict[str, Tensor] = {}
    for split in SPLITS:
        n_rows = task.n_rows(split)
        if n_rows == 0:
            continue
        scores = []
        for positions in torch.arange(n_rows).split(batch_size):
            batch = task.batch(split, positions)
            with autocast:
                logits = task.logits(model, batch)
            scores.append(task.row_scores(logits, batch))
        losses[split] = torch.cat([part.loss for part in scores]).cpu()
        min_k[split] = torch.cat([part.min_k for part in scores]).cpu()
        metrics[f"{split}_loss"] = float(losses[split].double().mean())
        metrics[f"{split}_accuracy"] = float(torch.cat([part.correct for part in scores]).double().mean())
        metrics[f"{split}_entropy"] = float(torch.cat([part.entropy for part in scores]).double().mean())
    for name, negatives, positives in (("retain_forget", "retain", "forget"), ("forget_test", "forget", "test")):
        if negatives in losses and positives in losses:
            metrics[f"{name}_loss_auc"] = auc(losses[negatives], losses[positives])
            # A low min-k score is a high loss: the roles swap so that both AUCs have the same ideal value.
            metrics[f"{name}_min_k_auc"] = auc(min_k[positives], min_k[negatives])
    return metrics
