"""The paired-gradient engine: two backward passes, one read of the device, one linear combination.

Each role has one flat buffer that the backward pass accumulates into (every `param.grad` is a view of it), so gradient
accumulation needs no code and the combination is two operations on the whole model. With a group of processes each does one
role, and the combination of one shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hamu.methods.base import Method, MethodSettings
from hamu.methods.combine import Decision, StepRules, decide_step
from hamu.methods.gram import unscaled_clip
from hamu.training.groups import Group, SplitPair, roles_of
from hamu.training.pairs import FORGET, NO_WISH, RETAIN, GradientPair, LocalPair, Reading, Wish

FLOAT16_LOSS_SCALE = 1024.0
"""Keeps small gradients of a float16 backward pass above its underflow; an overflow ends the run as non-finite."""

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of the passes under autocast, by the name in a configuration."""

BATCH_NORM = (nn.modules.batchnorm._BatchNorm,)


class BatchLike(Protocol):
    """What the engine reads of a batch: the labels, shape (n_labels,)."""

    labels: Tensor


class LogitsTask(Protocol):
    """What the engine asks of a task."""

    def logits(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """Logits of every label of a batch, shape (n_labels, classes)."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step saw: the decision, the objectives' means over the step's labels (nats), the norms before clipping, and what
    the processes agreed on."""

    decision: Decision
    retain_loss: float
    forget_loss: float
    retain_grad_norm: float
    forget_grad_norm: float
    wish: Wish


class PairedEngine:
    """Gradients of both roles of a model, and the step they give.

    Args:
        task: turns a batch into logits.
        model: its parameters that require gradients are the blocks.
        method: objectives and rule.
        settings: the method's hyper-parameters.
        original: the frozen original, for `LogitsTask.logits`, of methods that need it.
        freeze_batchnorm: keep BatchNorm's running statistics fixed (its affine parameters train).
        autocast: dtype of the passes, None for the parameters' own; Grams, weights and update keep the parameters' dtype. With
            float16 losses are scaled before the backward pass, and the scale is taken out of the weights.
        group: processes that share a step, more than one: of a paired method even ranks take the retain passes and odd ranks
            the forget passes, of another all take its one role. `decide` and `apply` are then called by all of them.
    """

    def __init__(
        self,
        task: LogitsTask,
        model: nn.Module,
        method: Method,
        *,
        settings: MethodSettings | None = None,
        original: Callable[..., Any] | None = None,
        freeze_batchnorm: bool = True,
        autocast: torch.dtype | None = None,
        compile_model: bool = False,
        group: Group | None = None,
    ) -> None:
        self.task, self.model, self.method, self.original = task, model, method, original
        self.params: list[Tensor] = [param for param in model.parameters() if param.requires_grad]
        self._settings = settings or MethodSettings()
        self._freeze_batchnorm, self._autocast = freeze_batchnorm, autocast
        self.loss_scale = FLOAT16_LOSS_SCALE if autocast is torch.float16 else 1.0
        self._forward: nn.Module = torch.compile(model) if compile_model else model  # type: ignore[assignment]
        self.pair: GradientPair
        if group is None or group.size == 1:
            self.pair = LocalPair(self.params)
        else:
            only_role = RETAIN if method.forget is None else FORGET
            self.pair = SplitPair(self.params, group, roles_of(group.size, is_paired=method.is_paired, only_role=only_role))
        self.layout = self.pair.layout
        self._losses = torch.zeros(2, dtype=torch.float64, device=self.layout.device)
        self._n_labels = [0, 0]
        self._average_retain: Tensor | None = None

    def set_training_mode(self) -> None:
        """Put the model in training mode, but for frozen BatchNorm layers."""
        self.model.train()
        if self._freeze_batchnorm:
            for module in self.model.modules():
                if isinstance(module, BATCH_NORM):
                    module.eval()

    def gradients(self, retain_parts: Sequence[BatchLike], forget_parts: Sequence[BatchLike]) -> None:
        """Fill the gradient buffers: the retain passes, then the forget passes.

        A role that the method has not, or that another process does, stays zero; one whose parts have no rows stays zero too.
        """
        self._losses.zero_()
        self.pair.zero_()
        roles = (
            (RETAIN, "retain", self.method.retain, retain_parts),
            (FORGET, "forget", self.method.forget, forget_parts),
        )
        for role, name, build, parts in roles:
            views = self.pair.views(role)
            self._n_labels[role] = n_labels = sum(len(part.labels) for part in parts)
            if build is None or views is None:
                continue
            objective, reads_original = build(self._settings), name in self.method.reads_original
            for param, view in zip(self.params, views, strict=True):
                param.grad = view
            for part in parts:
                with self.autocast():
                    logits = self.task.logits(self._forward, part)
                    losses = objective(logits, part.labels, self._original_logits(part) if reads_original else None)
                loss = losses.sum() / n_labels
                (loss * self.loss_scale).backward()
                self._losses[role] += loss.detach()

    def read(self, wish: Wish = NO_WISH) -> Reading:
        """Read the pair's Grams as the backward passes left it, losses and wishes.

        Reads the device once; once more where the gradients of some block are nearly colinear, so that Grams in float64 are
        needed. With a group this is where its processes exchange their gradients, and all of them read the same.
        """
        self.pair.exchange(self._losses, self._n_labels, wish)
        reading = self.pair.read(precise=False)
        return self.pair.read(precise=True) if reading.grams.is_nearly_colinear else reading

    def decide(self, *, lr: float, rules: StepRules, max_grad_norm: float | None, wish: Wish = NO_WISH) -> StepReport:
        """Turn the pair's Grams into weights.

        Reads the device as `read` does, and once more with GRU's moving average.
        """
        reading = self.read(wish)
        of_step = reading.grams
        clip = unscaled_clip(of_step, max_grad_norm, self.loss_scale)
        is_averaged = self._settings.gru_beta > 0 and self.method.averages_retain
        if is_averaged and of_step.is_finite and not reading.wish.stop:
            self._take_average(clip[0])
            clip, of_step = (1.0, clip[1]), self.pair.read(precise=True).grams
        decision = decide_step(self.method, of_step, lr=lr, rules=rules, clip=clip)
        return StepReport(
            decision=decision,
            retain_loss=reading.retain_loss,
            forget_loss=reading.forget_loss,
            retain_grad_norm=math.sqrt(reading.grams.retain.sum()) / self.loss_scale,
            forget_grad_norm=math.sqrt(reading.grams.forget.sum()) / self.loss_scale,
            wish=reading.wish,
        )

    @torch.no_grad()
    def apply(self, decision: Decision, *, lr: float, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Change the weights: by the update itself (plain SGD), or by a step of `optimizer` on -update / lr as gradient."""
        if optimizer is None:
            torch._foreach_add_(self.params, self.pair.combine(decision.table))
            return
        for param, grad in zip(self.params, self.pair.combine(decision.table / -lr), strict=True):
            param.grad = grad
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

    @property
    def average_retain(self) -> Tensor | None:
        """GRU's moving average of the clipped retain gradient, a flat buffer; part of a checkpoint."""
        return None if self._average_retain is None else self.pair.whole(self._average_retain)

    @average_retain.setter
    def average_retain(self, buffer: Tensor | None) -> None:
        self._average_retain = None if buffer is None else self.pair.own(buffer.to(self.layout.device))

    def autocast(self) -> AbstractContextManager[object]:
        """Context in which passes run at the chosen precision."""
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.layout.device.type, dtype=self._autocast)

    def _original_logits(self, part: BatchLike) -> Tensor:
        assert self.original is not None, f"method {self.method.name} needs the original model"
        with torch.no_grad():
            return self.task.logits(self.original, part)

    def _take_average(self, factor: float) -> None:
        # GRU (arXiv 2503.09117): m = beta g_r + (1 - beta) m_prev, started at g_r; m takes the place of g_r.
        retain, beta = self.pair.table[RETAIN], self._settings.gru_beta
        retain.mul_(factor)
        if self._average_retain is None:
            self._average_retain = retain.clone()
        else:
            self._average_retain.lerp_(retain, beta)
        retain.copy_(self._average_retain)
