"""What a run is made of, from its configuration: the method, the engine, the plan of its batches, and the batches of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from hamu.methods.base import Method, MethodSettings
from hamu.methods.catalog import find_method
from hamu.methods.core import descend_retain
from hamu.methods.objectives import cross_entropy
from hamu.tasks.base import Task
from hamu.training.batches import BatchPlan, rows_of_roles
from hamu.training.config import TrainConfig
from hamu.training.engine import PRECISIONS, PairedEngine
from hamu.training.groups import Group
from hamu.training.pairs import FORGET, RETAIN, GradientPair

TRAINING = Method(
    name="none",
    summary="plain training",
    source="none: cross-entropy",
    rule=descend_retain,
    retain=lambda settings: cross_entropy,
    forget=None,
)


def method_of(config: TrainConfig) -> Method:
    """The unlearning method of a configuration, or plain training."""
    return find_method(config.method_name) if config.is_unlearning else TRAINING


def train_split(config: TrainConfig) -> str:
    """The split that retain batches are taken from: "retain", or "train" for an original."""
    return "retain" if config.is_unlearning or not config.data.add_forget_to_train else "train"


def make_engine(
    config: TrainConfig, task: Task, model: nn.Module, method: Method, *, original: Callable[..., Any] | None, group: Group
) -> PairedEngine:
    """Make the engine of a run; original: default for a method that needs one: the model as it is now."""
    if method.needs_original and original is None:
        original = task.frozen(model)
    return PairedEngine(
        task,
        model,
        method,
        settings=MethodSettings(**{name: getattr(config.method, name) for name in MethodSettings.__dataclass_fields__}),
        original=original,
        freeze_batchnorm=config.freeze_batchnorm,
        autocast=PRECISIONS[config.training.precision],
        compile_model=task.can_compile and not config.training.no_torch_compile and next(model.parameters()).is_cuda,
        group=group,
    )


def plan_batches(config: TrainConfig, task: Task, method: Method, *, n_processes: int) -> BatchPlan:
    """Plan the rows of every step of a run in so many processes.

    One process alone can do the steps of several, by accumulation.
    """
    n = max(n_processes, config.run.num_workers)
    assert n_processes in (1, n), "the group has as many processes as the configuration says"
    return BatchPlan(
        n_retain=task.n_rows(train_split(config)),
        n_forget=task.n_rows("forget"),
        rows_per_step=config.rows_per_step_of(n),
        seed=config.shuffle_seed if config.data.shuffle_dataset else None,
    )


def batches_of_step(
    config: TrainConfig, task: Task, method: Method, plan: BatchPlan, pair: GradientPair, step: int
) -> tuple[list[Any], list[Any]]:
    """This process's batches of each role in a step; none where the role is another's, or its rows do not go round."""
    size = config.training.per_device_train_batch_size
    rows_of_role = rows_of_roles(plan, step, method, is_training=method is TRAINING)
    parts: list[list[Any]] = []
    for role, split in ((RETAIN, train_split(config)), (FORGET, "forget")):
        rows = rows_of_role[role]
        share, n_shares = pair.share(role)
        own = [] if rows is None or share is None else task.parts(split, rows.tensor_split(n_shares)[share], size)
        parts.append([task.batch(split, part) for part in own if len(part)])
    return parts[0], parts[1]
