"""What a run has come to besides its weights, and how all of it is saved and put back: a resumed run has the numbers of one
that was never stopped."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hamu.errors import CheckpointError
from hamu.training.checkpoints import changing_state, load_changing_state, load_checkpoint, save_checkpoint
from hamu.training.config import TrainConfig
from hamu.training.engine import PairedEngine
from hamu.training.groups import Group
from hamu.training.records import Recorder


@dataclass(kw_only=True)
class RunState:
    """How far a run is, and what it has seen.

    step: steps applied. train_s: seconds of steps and evaluations; steps_s: of steps alone. fired: steps in a row, up to now, at
    which the stopping criterion fired and the run went on. before, after: metrics of the first and of the last evaluation.
    evaluated_at: the step of the latter, -1 before it. hardness: S, the largest feasible ratio and kappa at the first pair of
    gradients. best: the best model of a training so far, with its score, its step and its metrics.
    """

    step: int = 0
    train_s: float = 0.0
    steps_s: float = 0.0
    fired: int = 0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    evaluated_at: int = -1
    hardness: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)

    def gains(self, metrics: dict[str, float]) -> dict[str, float]:
        """Forget quality and retain utility of an evaluation, in nats; empty where a loss is missing."""
        if not {"forget_loss", "retain_loss"} <= metrics.keys() & self.before.keys():
            return {}
        return {
            "forget_quality": metrics["forget_loss"] - self.before["forget_loss"],
            "retain_utility": self.before["retain_loss"] - metrics["retain_loss"],
        }

    def keep_best(self, model: nn.Module, metrics: dict[str, float], *, score: float) -> None:
        """Remember a model if its score is above that of the best one so far."""
        if not self.best or score > self.best["score"]:
            kept = {name: value.detach().clone() for name, value in changing_state(model).items()}
            self.best = {"score": score, "step": self.step, "model": kept, "metrics": dict(metrics)}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a run that a checkpoint is made of, besides its `RunState`; recorder: of the first process, if it records."""

    config: TrainConfig
    model: nn.Module
    engine: PairedEngine
    optimizer: torch.optim.Optimizer | None
    group: Group
    recorder: Recorder | None


def save_run(path: Path, state: RunState, parts: Parts, *, started: float) -> None:
    """Write a checkpoint; all processes of the group call it, the first one writes. started: of `time.perf_counter`."""
    average_retain, rng = parts.engine.average_retain, parts.group.gather_numbers(_random_state(parts.group))
    if not parts.group.is_first:
        return
    if parts.recorder is not None:
        parts.recorder.flush()
    save_checkpoint(
        path,
        {
            "recipe": parts.config.recipe_hash(),
            "wall_s": time.perf_counter() - started,
            "model": changing_state(parts.model),
            "optimizer": None if parts.optimizer is None else parts.optimizer.state_dict(),
            "average_retain": average_retain,
            "rng": rng.cpu(),
            "n_parts": 0 if parts.recorder is None else parts.recorder.n_parts,
            **{name: getattr(state, name) for name in _NAMES},
        },
    )


def load_run(path: Path, parts: Parts, *, adopts: bool) -> tuple[RunState, float]:
    """Put back what `save_run` wrote.

    Args:
        path: of the checkpoint.
        parts: changed in place.
        adopts: take one of another recipe too, and leave the records as they are.

    Returns:
        The state, and the moment of `time.perf_counter` at which the run would have been started to be as far without a stop.

    Raises:
        CheckpointError: it cannot be read, or is of another run.
    """
    saved, recipe = load_checkpoint(path), parts.config.recipe_hash()
    if saved.get("recipe") != recipe and not adopts:
        raise CheckpointError(
            f"checkpoint {str(path)!r} is of recipe {saved.get('recipe')}, this run is {recipe}; a run resumes with the settings "
            "it began with: give those, or another output folder"
        )
    load_changing_state(parts.model, saved["model"])
    if parts.optimizer is not None:
        parts.optimizer.load_state_dict(saved["optimizer"])
    parts.engine.average_retain = saved["average_retain"]
    torch.set_rng_state(
        saved["rng"].view(-1, saved["rng"].shape[-1])[parts.group.rank].clone()
    )  # a view with an offset ends the process in torch
    if parts.recorder is not None and not adopts:
        parts.recorder.truncate(saved["n_parts"])
    # What an older checkpoint has not is as at the start.
    return RunState(**{name: saved[name] for name in _NAMES if name in saved}), time.perf_counter() - saved["wall_s"]


@contextmanager
def left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Put the random state and the model's buffers back at the end: passes inside leave no trace but in gradients."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        yield
    with torch.no_grad():
        for buffer, saved in buffers:
            buffer.copy_(saved)


def _random_state(group: Group) -> Tensor:
    return torch.get_rng_state().to(group.device)


_NAMES = tuple(field.name for field in dataclasses.fields(RunState))
