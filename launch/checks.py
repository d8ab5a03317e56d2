"""What a plan's settings point to: checked on the driver before Ray starts, without torch where that can be."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hamu.errors import ConfigError, unknown
from hamu.hub import MODEL, check_available, why_not_cached
from hamu.tasks.catalog import is_built_in, modality_of
from hamu.training.inputs import check_inputs, is_local_path
from launch.pairing import pairing_of
from launch.plan import Plan, data_key

if TYPE_CHECKING:
    from hamu.tasks.base import Data
    from hamu.training.config import TrainConfig

TORCHVISION = "torchvision/"


def check_plan(plan: Plan, *, asks_hub: bool = True) -> None:
    """Refuse a plan whose model, dataset, column or class does not exist, whose trials pair their gradients differently, or that
    wants retain-only models where there can be none.

    No image is decoded, nothing is fetched. asks_hub: refuse a model of the hub that cannot be had, too.

    Raises:
        HamuError: one line with the value, the rule and the mend.
    """
    pairing_of(plan)
    check_references(plan)
    seen: set[tuple[object, ...]] = set()
    for config in plan.configs.values():
        data = config.data
        key = (
            data_key(config), config.run.seed, data.forget_class, data.hard_probability, data.split_ratio, config.run.model_name,
            config.logging.retain_reference,
        )  # fmt: skip
        if key not in seen:
            seen.add(key)
            check_inputs(config)
    for config in {config.run.model_name: config for config in plan.configs.values()}.values():
        check_model_name(config.run.model_name, modality_of(config).models)
        if asks_hub and is_on_hub(config):
            check_available(config.run.model_name, config.run.model_revision, MODEL)


def check_references(plan: Plan) -> None:
    """Refuse retain-only models beside originals that this program does not train: how to train them is not known, and training
    on from a folder that has seen the forget rows would give no model that has not.

    Raises:
        ConfigError: as said.
    """
    for key in plan.references:
        name = plan.reference(key).run.model_name
        if is_local_path(name):
            raise ConfigError(
                f"model_name {name!r} is the original itself, so how to train a retain-only model to compare with is not known; "
                "give --no-with-reference, or a model_name from which the sweep trains both"
            )


def missing_models(plan: Plan) -> list[str]:
    """A line for each model of the hub that is not in the cache."""
    on_hub = {(config.run.model_name, config.run.model_revision) for config in plan.configs.values() if is_on_hub(config)}
    return [why for name, revision in sorted(on_hub, key=str) if (why := why_not_cached(name, revision, MODEL)) is not None]


def is_on_hub(config: TrainConfig) -> bool:
    """Whether the model of a configuration comes from the hub, or its cache."""
    name = config.run.model_name
    return not is_local_path(name) and not is_built_in(name, modality_of(config).models)


def check_model_name(name: str, built_in: Sequence[str]) -> None:
    """Refuse a model name that no loader knows.

    Raises:
        ConfigError: not a built-in model, a torchvision model, a folder, or the form of a hub name.
    """
    if name in built_in or is_local_path(name):
        return  # `check_inputs` has looked at the folder
    if "/" not in name:
        ours = [known + "<name>" * known.endswith("/") for known in built_in]
        raise ConfigError(unknown("model", name, [*ours, "<owner>/<name> of the hub", "a folder"]))
    if TORCHVISION in built_in and name.startswith(TORCHVISION):
        from torchvision import models

        known = [TORCHVISION + each for each in models.list_models(module=models)]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"unknown model {name!r}; {hint}torchvision.models.list_models() names the {len(known)} known")
        return


def check_forget_sets(plan: Plan, datasets: Mapping[str, Data]) -> None:
    """Refuse a plan with a forget set that cannot be drawn from the loaded rows, such as of a class that has none.

    Raises:
        HamuError: one line with the value, the rule and the mend.
    """
    for config in plan.configs.values():
        modality_of(config).check_forget_set(config, datasets[data_key(config)])
