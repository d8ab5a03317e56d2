"""Flags that users of the published code know and that mean something else here; each is told in a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hamu.errors import ConfigError

# Flags that are accepted and do nothing, with what takes their place.
IGNORED = {
    "ddp_find_unused_parameters": "there is no DDP wrapper; gradients are exchanged once a step",
    "torch_empty_cache_steps": "the allocator keeps its blocks; lower per_device_train_batch_size to save memory",
}


def translate(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Take out the flags without a meaning here, and read `dataset_repeat` as epochs. An empty text counts as not given.

    Args:
        given: setting -> value, flags and environment together, without defaults.

    Returns:
        The settings in this project's terms, and one line for each that has another meaning here.

    Raises:
        ConfigError: `dataset_repeat` is below 1.
    """
    flat = {name: value for name, value in given.items() if value != ""}
    said: list[str] = []
    for name, instead in IGNORED.items():
        if name in flat:
            del flat[name]
            said.append(f"{name}: no effect, {instead}")
    _repeat(flat, said)
    return flat, said


def _repeat(flat: dict[str, Any], said: list[str]) -> None:
    """An epoch is one pass: `dataset_repeat` n makes n times the epochs, and fractions of an epoch n times as long."""
    n = flat.pop("dataset_repeat", 1)
    if n == 1:
        return
    if n < 1:
        raise ConfigError(f"dataset_repeat must be >= 1, got {n}")
    from hamu.training.config import OptimConfig

    epochs = float(flat.get("num_train_epochs", OptimConfig().num_train_epochs))
    flat["num_train_epochs"] = epochs * n
    said.append(f"dataset_repeat {n}: an epoch is one pass, so num_train_epochs {epochs:g} is read as {epochs * n:g}")
    for kind in ("logging", "eval", "save"):
        every = flat.get(f"{kind}_steps")
        if every is None or not 0 < every < 1:
            continue
        if every * n < 1:
            flat[f"{kind}_steps"] = every * n
            said.append(f"{kind}_steps {every:g}: read as {every * n:g} of a pass")
        else:
            del flat[f"{kind}_steps"]
            flat[f"{kind}_strategy"] = "epoch"
            said.append(f"{kind}_steps {every:g}: read as {kind}_strategy epoch, once a pass")
