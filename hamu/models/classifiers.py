"""Image classifiers by name: `resnet20`, `torchvision/<name>`, or a Hugging Face model by hub name or local folder.

A saved model is a folder: weights in safetensors, the description that its own library reads (`config.json`, or
`classifier.json` for torchvision), and `record.json`, which says how it was made.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from hamu.errors import CheckpointError, ConfigError
from hamu.hub import one_line
from hamu.models.loading import is_hub_name, offline_first, quiet, replaced_files
from hamu.models.resnet import ResNet20, resnet20_config

_RESNET20 = "resnet20"
_TORCHVISION = "torchvision/"
_STEM = "resnet.embedder.embedder.convolution.weight"


def build_classifier(
    model_name: str, *, n_classes: int, n_channels: int = 3, img_size: int | None = None, seed: int = 0
) -> nn.Module:
    """Build a classifier, with weights drawn from `seed` where the name brings none.

    Args:
        model_name: `resnet20` or `torchvision/<name>` (new weights), the hub name or local folder of a Hugging Face
            image classifier (its weights; a head of another number of classes is replaced by a new one), or a folder of
            `save_classifier`.
        n_classes: number of classes, at least 1.
        n_channels: channels of the images; only `resnet20` takes other than 3.
        img_size: height and width in pixels; only torchvision's `vit_*` are built for one size.
        seed: of the new weights. The caller's random state is left as it was.

    Returns:
        The model, in float32 on the CPU; whether it is in training mode is the caller's to set.

    Raises:
        ConfigError: the name is not known, or the model does not take such images.
        CheckpointError: the folder holds no image classifier, or the hub model cannot be had.
    """
    model_name = os.path.expanduser(model_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model_name == _RESNET20:
            return ResNet20(resnet20_config(n_classes=n_classes, n_channels=n_channels))
        if model_name.startswith(_TORCHVISION):
            return _new_torchvision(model_name, n_classes=n_classes, n_channels=n_channels, img_size=img_size)
        if (spec := _own_spec(model_name)) is not None:
            if (spec["n_classes"], spec["n_channels"]) != (n_classes, n_channels):
                raise ConfigError(
                    f"the model in {model_name!r} has {spec['n_channels']} channels and {spec['n_classes']} classes, "
                    f"got {n_channels} and {n_classes}; start from {spec['model_name']!r} instead"
                )
            return load_classifier(model_name)
        model = _from_pretrained(model_name, num_labels=n_classes)
        takes = int(getattr(model.config, "num_channels", 3))
        if takes != n_channels:
            raise ConfigError(f"model {model_name!r} takes {takes}-channel images, got {n_channels}; use 'resnet20'")
        return model


def input_shape(model_name: str, *, n_channels: int) -> tuple[int, int | None]:
    """Return what a model is to be fed for images of `n_channels`: channels, and height = width in pixels (None: any).

    A Hugging Face model says both in its configuration; torchvision models take 3 channels.

    Raises:
        ConfigError, CheckpointError: as `build_classifier`.
    """
    model_name = os.path.expanduser(model_name)
    if model_name == _RESNET20:
        return n_channels, None
    if model_name.startswith(_TORCHVISION):
        return 3, None
    if (spec := _own_spec(model_name)) is not None:
        return int(spec["n_channels"]), None
    config = _offline_first(AutoConfig.from_pretrained, model_name)
    native = getattr(config, "image_size", None)
    return int(getattr(config, "num_channels", 3)), native if isinstance(native, int) else None


def logits_of(model: Callable[..., Any], images: Tensor) -> Tensor:
    """Return the logits (n, classes) of a model that returns a tensor, or an output with `.logits`."""
    output = model(images)
    return output if isinstance(output, Tensor) else cast(Tensor, output.logits)


def save_classifier(model: nn.Module, path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a model folder; each file is replaced at once, so that a reader never sees half of one.

    Args:
        model: one that `build_classifier` or `load_classifier` returned, perhaps compiled.
        path: the folder; made when missing, other files in it are left alone.
        record: how the model was made (JSON-able: NaN becomes null, anything else its string), as `record.json`.

    Raises:
        CheckpointError: the model is of neither library, so that it could not be loaded again.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled module wraps the one that it was made from
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with replaced_files(path, record) as scratch:
        if isinstance(model, PreTrainedModel):
            with quiet():
                model.save_pretrained(scratch, state_dict=weights)
            return
        spec = getattr(model, "classifier_spec", None)
        if spec is None:
            raise CheckpointError(
                f"cannot save a {type(model).__name__}: only models from build_classifier can be loaded again by name"
            )
        save_file(weights, scratch / "model.safetensors")
        (scratch / "classifier.json").write_text(json.dumps(spec, indent=2) + "\n")


def load_classifier(path: str | Path) -> nn.Module:
    """Load a model folder: one of `save_classifier`, a published ResNet-20, or any Hugging Face image classifier.

    Returns:
        The model, in float32 on the CPU, in evaluation mode.

    Raises:
        CheckpointError: the folder is missing, or holds no image classifier.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"no model folder at {str(folder)!r}; give the folder that holds the model's weights")
    if (folder / "config.json").is_file():
        return _from_pretrained(str(folder)).eval()
    spec = _own_spec(folder)
    if spec is None:
        raise CheckpointError(
            f"folder {str(folder)!r} holds neither config.json nor classifier.json; give a folder that a run saved"
        )
    try:
        model = build_classifier(**spec)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot load the model in {str(folder)!r} ({one_line(error)}); make it anew") from error
    return model.eval()


def _new_torchvision(model_name: str, *, n_classes: int, n_channels: int, img_size: int | None) -> nn.Module:
    name = model_name.removeprefix(_TORCHVISION)
    known = _torchvision_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean '{_TORCHVISION}{near[0]}'? " if near else ""
        raise ConfigError(f"unknown model {model_name!r}; {hint}torchvision.models.list_models() names the {len(known)} known")
    if n_channels != 3:
        raise ConfigError(f"model {model_name!r} takes 3-channel images, got {n_channels}; use 'resnet20'")
    settings: dict[str, Any] = {"image_size": img_size} if name.startswith("vit_") and img_size else {}
    try:
        model = cast(nn.Module, torchvision.models.get_model(name, weights=None, num_classes=n_classes, **settings))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"cannot build {model_name!r} for images of {img_size} pixels ({one_line(error)}); choose another img_size"
        ) from error
    # What load_classifier needs to build the module again; a torchvision folder has no configuration of its own.
    spec = {"model_name": model_name, "n_classes": n_classes, "n_channels": n_channels, "img_size": img_size}
    model.classifier_spec = spec  # type: ignore[assignment]
    return model


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _from_pretrained(name: str, **settings: Any) -> PreTrainedModel:
    kind: Any = ResNet20 if _has_small_stem(Path(name)) else AutoModelForImageClassification
    settings |= {"dtype": torch.float32, "ignore_mismatched_sizes": "num_labels" in settings}
    return cast(PreTrainedModel, _offline_first(kind.from_pretrained, name, **settings))


def _own_spec(path: str | Path) -> dict[str, Any] | None:
    """What `save_classifier` wrote of a torchvision model, the arguments of `build_classifier`; else None."""
    file = Path(path) / "classifier.json"
    if not file.is_file() or (Path(path) / "config.json").is_file():
        return None
    try:
        spec = json.loads(file.read_text())
        return {key: spec[key] for key in ("model_name", "n_classes", "n_channels", "img_size")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {str(file)!r} ({one_line(error)}); make the model anew") from error


def _has_small_stem(folder: Path) -> bool:
    """Whether a folder holds a `resnet` with a 3x3 stem: told by the weights, since `config.json` cannot say it."""
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        return False
    try:
        if json.loads((folder / "config.json").read_text()).get("model_type") != "resnet":
            return False
        with safe_open(folder / "model.safetensors", framework="pt") as weights:
            return _STEM in weights.keys() and weights.get_slice(_STEM).get_shape()[-1] == 3  # noqa: SIM118
    except (OSError, ValueError, SafetensorError):
        return False  # from_pretrained says what is wrong with the folder


def _offline_first(load: Callable[..., Any], name: str, **settings: Any) -> Any:
    """`offline_first`, of a name that can be a model's."""
    if not os.path.isdir(name) and not is_hub_name(name):
        ours = ["resnet20", *(_TORCHVISION + known for known in _torchvision_names())]
        near = difflib.get_close_matches(name, ours, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ":"
        raise ConfigError(f"unknown model {name!r}{hint} give resnet20, torchvision/<name>, a hub name owner/model or a folder")
    return offline_first(load, name, wanted="an image classifier", **settings)
