"""LoRA adapters on a frozen language model: new ones, and those of a folder in peft's format."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from hamu.errors import CheckpointError, ConfigError
from hamu.hub import one_line
from hamu.models.loading import LOAD_ERRORS, quiet

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FOLDER = "base"
"""Folder in an adapter folder that holds the base model, where that came from no folder and no hub."""
_ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """A new LoRA adapter; see https://arxiv.org/abs/2106.09685."""

    r: int = 8
    """Rank, at least 1."""
    alpha: float = 16
    """The adapter's product is scaled by alpha / r."""
    dropout: float = 0.0
    """Of the adapter's input, in [0, 1)."""
    targets: str = _ALL_LINEAR
    """Modules that get an adapter: `all-linear` (all but the output head), or names with commas between: "q_proj,v_proj"."""
    name: str = "default"
    """The adapter's name, part of its parameters' names; without dots."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"LoRA rank {self.r}: must be at least 1; 8 is usual")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA dropout {self.dropout}: must be in [0, 1); 0 turns it off")
        if not self.name or "." in self.name or "/" in self.name:
            raise ConfigError(f"LoRA name {self.name!r}: must have no dot or slash and not be empty; 'default' will do")
        if not _names(self.targets):
            raise ConfigError("LoRA targets are empty; give 'all-linear', or names such as 'q_proj,v_proj'")


def new_adapter(base: PreTrainedModel, settings: LoraSettings, *, seed: int, revision: str | None = None) -> PeftModel:
    """Put a new LoRA adapter on a model, which is frozen by it; the outputs do not change yet, since half of it is zero.

    Args:
        base: changed in place.
        seed: of the other half. The caller's random state is left as it was.
        revision: of the base on the hub, noted in the adapter's configuration.

    Returns:
        The model, whose adapter alone requires gradients, in float32.

    Raises:
        ConfigError: the targets are no modules of this model.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=cast(int, settings.alpha),
        lora_dropout=settings.dropout,
        target_modules=_ALL_LINEAR if settings.targets == _ALL_LINEAR else _names(settings.targets),
        revision=revision,
    )
    with torch.random.fork_rng(devices=[]), _quiet_peft():
        torch.manual_seed(seed)
        try:
            return cast(PeftModel, get_peft_model(base, config, adapter_name=settings.name))
        except ValueError as error:
            linear = sorted({name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, nn.Linear)})
            raise ConfigError(
                f"LoRA targets {settings.targets!r} do not fit the model ({one_line(error)}); its linear modules: "
                + ", ".join(linear)
            ) from error


def adapter_folder(folder: Path) -> Path | None:
    """Return where the adapter of a folder lies: there, or in its one folder of an adapter's name; None: there is none.

    Raises:
        CheckpointError: there are several.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return folder
    if (folder / "config.json").is_file() or not folder.is_dir():
        return None
    found = sorted(file.parent for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise CheckpointError(f"folder {str(folder)!r} holds several adapters ({names}); give the folder of one of them")
    return found[0] if found else None


def base_of(adapter: Path) -> tuple[str, str | None]:
    """Return the base of an adapter folder, a folder or a hub name, and its revision on the hub.

    Raises:
        CheckpointError: the folder is no LoRA adapter's, or does not say what its base is.
    """
    said = adapter_settings(adapter)
    if (adapter / BASE_FOLDER / "config.json").is_file():
        return str(adapter / BASE_FOLDER), None
    name = said.get("base_model_name_or_path")
    if not name:
        raise CheckpointError(
            f"adapter folder {str(adapter)!r} does not say its base model; put it into {BASE_FOLDER!r} there, or its name "
            f"into base_model_name_or_path of {ADAPTER_CONFIG}"
        )
    return str(name), said.get("revision")


def adapter_settings(adapter: Path) -> dict[str, Any]:
    """Return what `adapter_config.json` says.

    Raises:
        CheckpointError: it cannot be read, or is not of a LoRA adapter.
    """
    file = adapter / ADAPTER_CONFIG
    try:
        said = json.loads(file.read_text())
        kind = said.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"cannot read {str(file)!r} ({one_line(error)}); give the folder of a LoRA adapter") from error
    if kind != "LORA":
        raise CheckpointError(f"{str(file)!r} is of an adapter of type {kind}; only LoRA adapters can be continued")
    return cast(dict[str, Any], said)


def check_same_adapter(folder: str | Path, asked: LoraSettings) -> None:
    """Refuse LoRA settings that are not those of the adapter in a folder, which is gone on with as it is.

    Raises:
        ConfigError: the rank, the scale or the targets differ from the adapter's.
    """
    adapter = adapter_folder(Path(folder).expanduser())
    assert adapter is not None, "the folder holds an adapter"
    said = adapter_settings(adapter)
    has = {"lora_r": said.get("r"), "lora_alpha": said.get("lora_alpha")}
    wanted: dict[str, Any] = {"lora_r": asked.r, "lora_alpha": asked.alpha}
    if asked.targets != _ALL_LINEAR and isinstance(said.get("target_modules"), list):
        has["lora_targets"] = ",".join(sorted(said["target_modules"]))
        wanted["lora_targets"] = ",".join(sorted(_names(asked.targets)))
    for name, value in wanted.items():
        if value != has[name]:
            raise ConfigError(
                f"{name} {value} does not go with the adapter in {str(folder)!r}, which has {has[name]} and is gone on with; "
                f"leave add_lora and {name} out, or train the original with it"
            )


def load_adapter(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """Put the adapter of a folder on its base, with its own settings, ready to be trained on.

    Raises:
        CheckpointError: its weights are missing, broken or not of this base.
    """
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"adapter folder {str(adapter)!r} has no {ADAPTER_WEIGHTS}; save the adapter as safetensors")
    try:
        with _quiet_peft():
            return PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    except (*LOAD_ERRORS, TypeError) as error:
        raise CheckpointError(f"cannot load the adapter in {str(adapter)!r} ({one_line(error)}); make it anew") from error


def write_adapter(net: PeftModel, folder: Path, *, with_base: bool) -> None:
    """Write an adapter in peft's format, whatever its name, and on request its base without the adapter."""
    with quiet():
        net.save_pretrained(str(folder), save_embedding_layers=False)  # else it asks the hub about the base
    named = folder / net.active_adapter
    if named.is_dir():  # an adapter not named "default" gets a folder, which no loader looks into
        for file in sorted(named.iterdir()):
            file.rename(folder / file.name)
        named.rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # an empty form
    if with_base:
        _write_base(net, folder / BASE_FOLDER)


def _write_base(net: PeftModel, folder: Path) -> None:
    """Write the frozen model under the adapter as a folder of its own; its weights are those the adapter was trained on."""
    base = cast(PreTrainedModel, net.get_base_model())
    weights: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for key, value in base.state_dict().items():
        if "lora_" in key or ".modules_to_save." in key or value.data_ptr() in seen:
            continue  # a tied weight is written once, under its first name
        seen.add(value.data_ptr())
        weights[key.replace(".base_layer.", ".").replace(".original_module.", ".")] = value.detach().cpu().contiguous()
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = type(base.config).from_dict(base.config.to_dict() | {"architectures": [type(base).__name__]})
    config.save_pretrained(folder)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Silence what a user can do nothing about: names that peft reads and transformers will drop, layers it transposes itself."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        yield


def _names(targets: str) -> list[str]:
    return [name for part in targets.split(",") if (name := part.strip())]
