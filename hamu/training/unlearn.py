"""`hamu.unlearn`: unlearning for a model and datasets of one's own, in one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hamu.errors import ConfigError
from hamu.methods.names import METHOD_NAMES
from hamu.tasks.own import OwnTask, Rows
from hamu.training.config import ALIASES, KNOWN, MethodConfig, TrainConfig
from hamu.training.fields import settings_of
from hamu.training.loop import TrainingRun
from hamu.training.method_settings import NO_METHOD
from hamu.training.progress import watch

READ_SETTINGS = frozenset((
    *(name for name in settings_of(MethodConfig) if not name.startswith("_")),
    "seed", "shuffle_seed", "shuffle_dataset", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "weight_decay", "lr_scheduler_type", "max_grad_norm", "fp16", "bf16",
    "no_torch_compile", "target_test_accuracy", "logging_strategy", "logging_steps", "eval_strategy", "eval_steps",
))  # fmt: skip
"""The settings that mean something for a model and rows that are given, and a run that writes no files."""


@dataclass(frozen=True, kw_only=True)
class Unlearned:
    """What `unlearn` did. before, after: losses (nats), accuracies, entropies and membership AUCs by split. stop_reason: why it
    ended. hardness: S, the largest feasible constraint ratio and kappa at the first step. message: said on an early end."""

    before: dict[str, float]
    after: dict[str, float]
    stop_reason: str
    steps: int
    hardness: dict[str, float]
    message: str | None


def unlearn(
    model: nn.Module,
    retain: Rows,
    forget: Rows,
    *,
    test: Rows | None = None,
    method: str = "hamu-q",
    lr: float,
    epochs: float = 1.0,
    batch_size: int = 128,
    seed: int = 42,
    progress: bool = True,
    on_report: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> Unlearned:
    """Unlearn the forget rows from a classifier: its weights change in place; training mode and `.grad` are left as they were.

    Args:
        model: any module that maps inputs (n, ...) to logits (n, classes), on the device it is on. Parameters that do not
            require a gradient stay as they are; the others are of one type on one device.
        retain, forget: torch Datasets of (input, label), or pairs of tensors (inputs (n, ...), labels (n,)). Held in memory.
        test: rows to report on besides; optional.
        method: a key of METHODS.
        lr: learning rate, > 0.
        epochs: passes over the retain rows; a fraction is allowed.
        batch_size: rows of each role a step.
        seed: of the order of rows.
        progress: draw a progress line on a terminal when it takes longer than two seconds.
        on_report: called with each recorded step and evaluation.
        settings: any other of READ_SETTINGS, by its name as in `python -m hamu.cli.train --help`: constraint_ratio=0.5,
            stopping_rule="feasible".

    Returns:
        Unlearned: the metrics before and after, and why the run ended.

    Raises:
        ConfigError: a setting is unknown, not read here, out of range, or larger than any gradients could meet; or the model
            has nothing to train, or parameters of several types or devices.
        DataError: the rows are not (input, label) pairs, or a set is empty.

    Warns:
        UserWarning: a setting is given that has no effect with the others, or one that voids HAMU's guarantee.
    """
    if method == NO_METHOD:
        raise ConfigError(f"method {NO_METHOD!r} trains; hamu.unlearn takes a method that unlearns: {', '.join(METHOD_NAMES)}")
    _check_settings(settings)
    config = TrainConfig.from_flat(
        # No known model name, so that a fixed radius is checked with this model's blocks (by TrainingRun) and no others.
        {"model_name": "own", "method": method, "lr": lr, "epochs": epochs, "batch_size": batch_size, "seed": seed, **settings}
    )
    target = config.training.target_test_accuracy
    if target is not None and test is None:
        raise ConfigError(f"target_test_accuracy {target:g} needs test rows; give test, or leave it out")
    params = _trainable(model)
    task = OwnTask(retain, forget, test, model=model, device=params[0].device)
    for line in config.warnings():
        warnings.warn(line, stacklevel=2)
    with _left_as_it_was(model, params):
        run = TrainingRun(config, task, model)
        for report in watch(run, title=method, enabled=progress):
            if on_report is not None:
                on_report(report)
    result = run.result
    assert result is not None
    return Unlearned(
        before=result.before,
        after=result.after,
        stop_reason=str(result.stop_reason),
        steps=result.steps,
        hardness=result.hardness,
        message=result.message,
    )


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what a run on given rows and a given model would ignore; unknown names are left to the configuration."""
    for given, value in settings.items():
        name = ALIASES.get(plain := given.replace("-", "_"), plain)
        if name in KNOWN and name not in READ_SETTINGS:
            raise ConfigError(
                f"{given} {value!r} is not read by hamu.unlearn, which takes the rows and the model as they are given and writes "
                "no files; leave it out, or use python -m hamu.cli.train"
            )


def _trainable(model: nn.Module) -> list[Tensor]:
    """The parameters that unlearning changes.

    Raises:
        ConfigError: there is none, or they do not fit into one flat buffer.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model is a {type(model).__name__}; give a torch.nn.Module that maps inputs to logits")
    params: list[Tensor] = [param for param in model.parameters() if param.requires_grad]
    if not params:
        n_frozen = sum(1 for _ in model.parameters())
        raise ConfigError(
            f"the model has {n_frozen} parameters and none that requires a gradient; unlearning changes such parameters: call "
            "requires_grad_() on those to change"
        )
    kinds = sorted({f"{str(param.dtype).removeprefix('torch.')} on {param.device}" for param in params})
    if len(kinds) > 1:
        raise ConfigError(
            f"the model's trainable parameters are {' and '.join(kinds)}; they must be of one type on one device: convert the "
            "model first, with model.float() or model.to(device)"
        )
    return params


@contextmanager
def _left_as_it_was(model: nn.Module, params: list[Tensor]) -> Iterator[None]:
    """Restore the mode of every module and every `.grad` at the end, however the block ends."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [param.grad for param in params]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
