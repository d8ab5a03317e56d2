"""MODALITIES: what the rest must know of a kind of data to set up a run of it; one entry each. Torch-free until it is used.

To add one: a class in this folder that offers what `Task` describes, a function that makes it of a configuration, an entry here,
and its name and defaults in `MODALITY_DEFAULTS` of `hamu/training/config.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hamu.errors import DataError

if TYPE_CHECKING:
    from hamu.data.splits import ForgetSet
    from hamu.tasks.base import Data, Task
    from hamu.training.config import TrainConfig


HubRows = tuple[str, "str | None", "str | None", "str | None"]
"""Dataset, subset, split and revision."""


@dataclass(frozen=True, kw_only=True)
class Modality:
    """How runs on one kind of data are set up.

    check_rows: refuse local rows that are not what the settings say, before torch is imported; nothing is fetched.
    load_data: the rows. check_forget_set: refuse loaded rows from which the forget set cannot be drawn. n_retain: how many of the
    loaded rows a trial keeps. make_task: the task of a configuration on loaded rows, `make_task(config, data, device=, start=)`
    with the folder of the model that will be loaded, if any. task_name: folder name of the data. group: folder, within a task and
    a seed, of the models that belong to a forget set. suffix: of the variants "full" and "retain" there. data_settings: the
    settings that decide which rows `load_data` gives. hub_rows: the datasets that the settings name, of which some may be on the
    hub. models: names of built-in models; datasets: of built-in rows.
    """

    check_rows: Callable[[TrainConfig], None]
    load_data: Callable[[TrainConfig], Data]
    check_forget_set: Callable[[TrainConfig, Any], None]
    n_retain: Callable[[TrainConfig, Any], int]
    make_task: Callable[..., Task]
    task_name: Callable[[TrainConfig], str]
    group: Callable[[TrainConfig, str], str]
    suffix: Callable[[TrainConfig], str]
    data_settings: tuple[str, ...]
    hub_rows: Callable[[TrainConfig], list[HubRows]]
    models: tuple[str, ...]
    datasets: tuple[str, ...]


def modality_of(config: TrainConfig) -> Modality:
    """The entry of a configuration's kind of data."""
    return MODALITIES[config.run.modality]


def is_built_in(name: str, known: tuple[str, ...]) -> bool:
    """Whether a name is one of the built-in ones, of which those that end in / are the beginnings of names."""
    return any(name == each or (each.endswith("/") and name.startswith(each)) for each in known)


# Classes of the image sets known by name, so that a class that does not exist is refused before anything is loaded.
_KNOWN_CLASSES = {"digits": 10, "cifar10": 10, "uoft-cs/cifar10": 10, "cifar100": 100, "uoft-cs/cifar100": 100}
_IMAGE_TASKS = {"uoft-cs/cifar10": "cifar", "cifar10": "cifar", "uoft-cs/cifar100": "cifar100"}
_PARTS = ("name", "subset", "split", "prompt_field", "response_field")


def _sources(*kinds: str) -> tuple[str, ...]:
    return tuple(f"{kind}dataset_{part}" for kind in kinds for part in _PARTS)


def _with_cache(config: TrainConfig) -> Any:
    return dataclasses.replace(config.data, dataset_cache_dir=config.dataset_cache_dir)


def _check_images(config: TrainConfig) -> None:
    """Open a local dataset, and draw the forget set from its labels; no image is decoded."""
    data = config.data
    n_classes = _KNOWN_CLASSES.get(data.dataset_name)
    if n_classes is None:
        folder = Path(data.dataset_name).expanduser()
        if not (data.dataset_name.startswith((".", "/")) or data.dataset_name.count("/") > 1 or folder.exists()):
            return  # a hub name
        if not folder.is_dir():
            raise DataError(f"dataset_name '{data.dataset_name}' is not a folder; give one, a hub name, or digits")
        from hamu.data.sources import read_train_labels

        _draw(config, read_train_labels(data))
    elif data.forget_class >= n_classes:
        raise DataError(
            f"forget_class {data.forget_class} does not exist in {data.dataset_name}; its classes are 0 to {n_classes - 1}"
        )


def _draw(config: TrainConfig, labels: Any) -> ForgetSet:
    from hamu.data.splits import draw_forget_set

    data = config.data
    return draw_forget_set(
        labels, forget_class=data.forget_class, rho=data.hard_probability, seed=config.run.seed, split_ratio=data.split_ratio
    )


def _check_drawn(config: TrainConfig, data: Any) -> None:
    _draw(config, data.train_labels)


def _load_images(config: TrainConfig) -> Data:
    from hamu.data.sources import load_image_data

    return load_image_data(_with_cache(config), img_size=config.run.img_size)


def _vision_task(config: TrainConfig, data: Any, **settings: Any) -> Task:
    from hamu.tasks.vision import task_for

    return task_for(config, data, **settings)


def _image_task_name(config: TrainConfig) -> str:
    """Folder name of an image task: "digits", "cifar", or the dataset's own name made fit for a path."""
    name = config.data.dataset_name.rstrip("/")
    short = name.rsplit("/", 1)[-1]
    return _IMAGE_TASKS.get(name) or _IMAGE_TASKS.get(short) or re.sub(r"[^A-Za-z0-9_.-]+", "_", short).strip("._") or "data"


def _forget_class_group(config: TrainConfig, variant: str) -> str:
    rho = 0.0 if variant == "full" else float(config.data.hard_probability)  # an original does not depend on rho
    return f"forget_{config.data.forget_class}_{rho}"


def _image_rows(config: TrainConfig) -> list[HubRows]:
    data = config.data
    train = (data.dataset_name, data.dataset_subset, data.dataset_split, data.dataset_revision)
    split = data.test_dataset_split or "test"
    if data.test_dataset_name is not None:
        return [train, (data.test_dataset_name, data.test_dataset_subset, split, None)]
    return [train, (data.dataset_name, data.test_dataset_subset or data.dataset_subset, split, data.dataset_revision)]


def _text_rows(config: TrainConfig) -> list[HubRows]:
    from hamu.data.text_sources import perturbed_sources, resolve_sources

    sources = list(resolve_sources(config.data).values())
    if config.logging.eval_tofu:
        sources += perturbed_sources(config.data).values()
    return [(source.name, source.subset, source.split, source.revision) for source in sources]


def _check_texts(config: TrainConfig) -> None:
    from hamu.data.texts import check_text_inputs

    check_text_inputs(config.data, with_perturbed=config.logging.eval_tofu)


def _load_texts(config: TrainConfig) -> Data:
    from hamu.data.texts import load_text_data

    return load_text_data(_with_cache(config), with_perturbed=config.logging.eval_tofu)


def _text_task(config: TrainConfig, data: Any, **settings: Any) -> Task:
    from hamu.tasks.text import task_for

    return task_for(config, data, **settings)


def _text_task_name(config: TrainConfig) -> str:
    from hamu.data.texts import text_task_name

    return text_task_name(config.data)


def _forget_subset_group(config: TrainConfig, variant: str) -> str:
    from hamu.data.texts import forget_group

    return forget_group(config.data)


def _duplicate_suffix(config: TrainConfig) -> str:
    from hamu.data.texts import duplicate_suffix

    return duplicate_suffix(config.data)


MODALITIES: dict[str, Modality] = {
    "vision": Modality(
        check_rows=_check_images,
        load_data=_load_images,
        check_forget_set=_check_drawn,
        n_retain=lambda config, data: len(_draw(config, data.train_labels).retain),
        make_task=_vision_task,
        task_name=_image_task_name,
        group=_forget_class_group,
        suffix=lambda config: "",
        data_settings=(*_sources("", "test_"), "dataset_revision"),
        hub_rows=_image_rows,
        models=("resnet20", "torchvision/"),
        datasets=("digits",),
    ),
    "llm": Modality(
        check_rows=_check_texts,
        load_data=_load_texts,
        check_forget_set=lambda config, data: None,  # its rows were named, and loaded
        n_retain=lambda config, data: len(data.retain),
        make_task=_text_task,
        task_name=_text_task_name,
        group=_forget_subset_group,
        suffix=_duplicate_suffix,
        data_settings=(
            *_sources("", "forget_", "duplicate_", "test_"),
            "dataset_revision", "forget_pct", "add_duplicate_to_retain", "strict", "eval_tofu",
        ),
        hub_rows=_text_rows,
        models=("tiny-llama",),
        datasets=("authors",),
    ),
}  # fmt: skip
