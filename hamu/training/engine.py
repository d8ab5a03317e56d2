"""The paired-gradient engine: two backward passes, one read of the device, one linear combination.

Each role has one flat buffer that the backward pass accumulates into (every `param.grad` is a view of it), so gradient
accumulation needs no code and the combination is two operations on the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hamu.methods.base import Method, MethodSettings
from hamu.methods.combine import Decision, StepRules, decide_step
from hamu.methods.gram import BlockLayout, Grams, clip_factors, grams_of_sums

FLOAT16_LOSS_SCALE = 1024.0
"""Keeps small gradients of a float16 backward pass above its underflow; an overflow ends the run as non-finite."""

BATCH_NORM = (nn.modules.batchnorm._BatchNorm,)


class BatchLike(Protocol):
    """What the engine reads of a batch: the labels, shape (n_labels,)."""

    labels: Tensor


class LogitsTask(Protocol):
    """What the engine asks of a task."""

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits of every label of a batch, shape (n_labels, classes)."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step saw: the decision, the objectives' means over the step's labels (nats), and the norms before clipping."""

    decision: Decision
    retain_loss: float
    forget_loss: float
    retain_grad_norm: float
    forget_grad_norm: float


class PairedEngine:
    """Gradients of both roles of a model, and the step they give.

    Args:
        task: turns a batch into logits.
        model: its parameters that require gradients are the blocks.
        method: objectives and rule.
        settings: the method's hyper-parameters.
        original: frozen original model, for methods that need it.
        freeze_batchnorm: keep BatchNorm's running statistics fixed (its affine parameters train).
        autocast: dtype of the passes, None for the parameters' own; Grams, weights and update keep the parameters' dtype. With
            float16 losses are scaled before the backward pass, and the scale is taken out of the weights.
    """

    def __init__(
        self,
        task: LogitsTask,
        model: nn.Module,
        method: Method,
        *,
        settings: MethodSettings | None = None,
        original: nn.Module | None = None,
        freeze_batchnorm: bool = True,
        autocast: torch.dtype | None = None,
        compile_model: bool = False,
    ) -> None:
        self.task, self.model, self.method, self.original = task, model, method, original
        self.params: list[Tensor] = [param for param in model.parameters() if param.requires_grad]
        self.layout = BlockLayout(self.params)
        self._settings = settings or MethodSettings()
        self._freeze_batchnorm, self._autocast = freeze_batchnorm, autocast
        self._loss_scale = FLOAT16_LOSS_SCALE if autocast is torch.float16 else 1.0
        self._forward: nn.Module = torch.compile(model) if compile_model else model  # type: ignore[assignment]
        self.pair = self.layout.zeros(self.params[0].dtype)
        """Both gradients, unclipped: row 0 retain, row 1 forget."""
        self._views = [self.layout.views(buffer) for buffer in self.pair]
        self._losses = torch.zeros(2, dtype=torch.float64, device=self.layout.device)
        self.average_retain: Tensor | None = None
        """GRU's moving average of the clipped retain gradient, a flat buffer; part of a checkpoint."""

    def set_training_mode(self) -> None:
        """Put the model in training mode, but for frozen BatchNorm layers."""
        self.model.train()
        if self._freeze_batchnorm:
            for module in self.model.modules():
                if isinstance(module, BATCH_NORM):
                    module.eval()

    def gradients(self, retain_parts: Sequence[BatchLike], forget_parts: Sequence[BatchLike]) -> None:
        """Fill both gradient buffers: the retain passes, then the forget passes. A role that the method has not stays zero."""
        self._losses.zero_()
        self.pair.zero_()
        roles = ((self.method.retain, retain_parts), (self.method.forget, forget_parts))
        for index, (build, parts) in enumerate(roles):
            if build is None:
                continue
            objective = build(self._settings)
            for param, view in zip(self.params, self._views[index], strict=True):
                param.grad = view
            n_labels = sum(len(part.labels) for part in parts)
            for part in parts:
                with self.autocast():
                    logits = self.task.logits(self._forward, part)
                    losses = objective(logits, part.labels, self._original_logits(part))
                loss = losses.sum() / n_labels
                (loss * self._loss_scale).backward()
                self._losses[index] += loss.detach()

    def decide(self, *, lr: float, rules: StepRules, max_grad_norm: float | None) -> StepReport:
        """Turn the pair's Grams into weights.

        Reads the device once; once more where the gradients of some block are nearly colinear, so that Grams in float64 are
        needed, and with GRU's moving average.
        """
        grams, losses = self._read(precise=False)
        if grams.is_nearly_colinear:
            grams, losses = self._read(precise=True)
        unscale = 1 / self._loss_scale
        of_step = grams
        grams = grams if unscale == 1 else grams.scaled(unscale, unscale)
        retain_clip, forget_clip = clip_factors(grams, max_grad_norm)
        clip = retain_clip * unscale, forget_clip * unscale
        if self._settings.gru_beta > 0 and self.method.averages_retain and grams.is_finite:
            self._average_retain(clip[0])
            clip, of_step = (1.0, clip[1]), self.layout.grams(self.pair)
        decision = decide_step(self.method, of_step, lr=lr, rules=rules, clip=clip)
        return StepReport(
            decision=decision,
            retain_loss=float(losses[0]),
            forget_loss=float(losses[1]),
            retain_grad_norm=math.sqrt(grams.retain.sum()),
            forget_grad_norm=math.sqrt(grams.forget.sum()),
        )

    @torch.no_grad()
    def apply(self, decision: Decision, *, lr: float, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Change the weights: by the update itself (plain SGD), or by a step of `optimizer` on -update / lr as gradient."""
        if optimizer is None:
            self.layout.combine_(self.pair, decision.table)
            torch._foreach_add_(self.params, self._views[0])
            return
        self.layout.combine_(self.pair, decision.table / -lr)
        for param, view in zip(self.params, self._views[0], strict=True):
            param.grad = view
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

    def autocast(self) -> AbstractContextManager[object]:
        """Context in which passes run at the chosen precision."""
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.layout.device.type, dtype=self._autocast)

    def _read(self, *, precise: bool) -> tuple[Grams, np.ndarray]:
        """Grams and losses, in one read of the device."""
        host = torch.cat([self.layout.gram_sums(self.pair, precise=precise).flatten(), self._losses]).cpu().numpy()
        return grams_of_sums(host[:-2].reshape(-1, 2, 2)), host[-2:]

    def _original_logits(self, part: BatchLike) -> Tensor | None:
        if not self.method.needs_original:
            return None
        assert self.original is not None, f"method {self.method.name} needs the original model"
        with torch.no_grad():
            return self.task.logits(self.original, part)

    def _average_retain(self, factor: float) -> None:
        # GRU (arXiv 2503.09117): m = beta g_r + (1 - beta) m_prev, started at g_r; m takes the place of g_r.
        retain, beta = self.pair[0], self._settings.gru_beta
        retain.mul_(factor)
        if self.average_retain is None:
            self.average_retain = retain.clone()
        else:
            self.average_retain.lerp_(retain, beta)
        retain.copy_(self.average_retain)
