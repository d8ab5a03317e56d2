"""What a plan's settings point to: checked on the driver before Ray starts, without torch where that can be."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hamu.data.splits import draw_forget_set
from hamu.errors import CheckpointError, ConfigError, unknown
from hamu.training.inputs import check_inputs, is_local_path
from launch.pairing import pairing_of
from launch.plan import Plan, data_key

if TYPE_CHECKING:
    from hamu.data.sources import ImageData

TORCHVISION = "torchvision/"


def check_plan(plan: Plan) -> None:
    """Refuse a plan whose model, dataset, column or class does not exist, or whose trials pair their gradients differently.

    No image is decoded, nothing is fetched.

    Raises:
        HamuError: one line with the value, the rule and the mend.
    """
    pairing_of(plan)
    seen: set[tuple[object, ...]] = set()
    for config in plan.configs.values():
        data = config.data
        key = (data_key(config), config.run.seed, data.forget_class, data.hard_probability, data.split_ratio)
        if key not in seen:
            seen.add(key)
            check_inputs(config)
    for name in {config.run.model_name for config in plan.configs.values()}:
        check_model_name(name)


def check_model_name(name: str) -> None:
    """Refuse a model name that no loader knows.

    Raises:
        ConfigError: not a built-in model, a torchvision model, a folder, or the form of a hub name.
        CheckpointError: a hub name that is neither cached nor on the hub (or the hub is out of reach).
    """
    if name == "resnet20" or is_local_path(name):
        return  # `check_inputs` has looked at the folder
    if "/" not in name:
        raise ConfigError(unknown("model", name, ["resnet20", "torchvision/<name>", "<owner>/<name> of the hub", "a folder"]))
    if name.startswith(TORCHVISION):
        from torchvision import models

        known = [TORCHVISION + each for each in models.list_models(module=models)]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"unknown model {name!r}; {hint}torchvision.models.list_models() names the {len(known)} known")
        return
    from huggingface_hub import try_to_load_from_cache

    from hamu.hub import why_not_on_hub

    if not isinstance(try_to_load_from_cache(name, "config.json"), str) and (reason := why_not_on_hub(name, "model")):
        raise CheckpointError(
            f"model {name!r} is neither in the local cache nor on the hub ({reason}); check the name, or fetch the model first"
        )


def check_forget_sets(plan: Plan, datasets: Mapping[str, ImageData]) -> None:
    """Refuse a plan with a forget set that cannot be drawn from the loaded rows, such as of a class that has none.

    Raises:
        HamuError: one line with the value, the rule and the mend.
    """
    for config in plan.configs.values():
        draw_forget_set(
            datasets[data_key(config)].train_labels,
            forget_class=config.data.forget_class,
            rho=config.data.hard_probability,
            seed=config.run.seed,
            split_ratio=config.data.split_ratio,
        )
