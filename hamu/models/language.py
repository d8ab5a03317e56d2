"""Causal language models: `tiny-llama`, or any by hub name or folder, with or without a LoRA adapter.

A saved model is a folder that its own library reads: of transformers for a full model, of peft for an adapter (with the base
in `base/` where it came from no other folder). Both hold the tokenizer, and `record.json`, which says how it was made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hamu.errors import CheckpointError, ConfigError
from hamu.models.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_FOLDER,
    LoraSettings,
    adapter_folder,
    adapter_settings,
    base_of,
    load_adapter,
    new_adapter,
    write_adapter,
)
from hamu.models.language_net import LanguageModel, context_of, embedding_of
from hamu.models.loading import is_hub_name, offline_first, quiet, replaced_files
from hamu.models.tiny_llama import TINY, TINY_CONTEXT, new_tiny_llama, train_tokenizer

__all__ = [
    "TINY",
    "LanguageModel",
    "LoraSettings",
    "build_language_model",
    "context_length",
    "load_language_model",
    "load_tokenizer",
    "save_language_model",
    "train_tokenizer",
]

_WANTED = "a causal language model"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def load_tokenizer(name: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model: from a folder (of an adapter: its own, else its base's), or by hub name.

    Args:
        name: folder or `owner/model`.
        revision: branch, tag or commit on the hub; of folders it is not read.

    Raises:
        ConfigError: `tiny-llama`, whose tokenizer is trained on the data, or a name of no known form.
        CheckpointError: there is no tokenizer, or the hub does not give it.
    """
    name = os.path.expanduser(name)
    if name == TINY:
        raise ConfigError(f"model {TINY!r} brings no tokenizer; use train_tokenizer on the texts of the data")
    adapter = adapter_folder(Path(name))
    if adapter is not None:
        for folder in (adapter, Path(name)):
            if any((folder / file).is_file() for file in _TOKENIZER_FILES):
                return _tokenizer(str(folder), revision=None)
        return load_tokenizer(*base_of(adapter)[:1], revision=base_of(adapter)[1])
    return _tokenizer(_checked_name(name), revision=revision)


def context_length(
    model_name: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None, revision: str | None = None
) -> int | None:
    """Return the longest row in tokens that a model takes, read from its configuration; None: any.

    Args:
        model_name: as of `build_language_model`, or a saved folder.
        tokenizer: its own limit, where it has one, counts too.
        revision: as of `build_language_model`.

    Raises:
        ConfigError, CheckpointError: as `build_language_model`.
    """
    model_name = os.path.expanduser(model_name)
    if model_name == TINY:
        limit: int | None = TINY_CONTEXT
    else:
        if (adapter := adapter_folder(Path(model_name))) is not None:
            model_name, revision = base_of(adapter)
        limit = context_of(_config(_checked_name(model_name), revision=revision))
    own = getattr(tokenizer, "model_max_length", None)
    if own is None or own > 10**9:  # transformers writes 1e30 where a tokenizer has no limit
        return limit
    return int(own) if limit is None else min(limit, int(own))


def build_language_model(
    model_name: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    lora: LoraSettings | None = None,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    revision: str | None = None,
) -> LanguageModel:
    """Build a model to train: `tiny-llama` with weights drawn from `seed`, or a pretrained one by hub name or folder.

    Args:
        model_name: `tiny-llama`, `owner/model`, or a folder; a folder of an adapter is loaded as `load_language_model` does.
        tokenizer: must have no token that the embedding has no row for.
        seed: of new weights: those of `tiny-llama`, and of a new adapter. The caller's random state is left as it was.
        lora: train a new adapter on the frozen model; None: train all weights.
        bf16: with an adapter, hold the frozen model in bfloat16 (the adapter stays in float32). All weights that are trained
            are float32 with or without it; autocast is the caller's.
        gradient_checkpointing: in training mode, keep no activations inside layers, and compute them twice instead.
        revision: branch, tag or commit on the hub.

    Returns:
        The model on the CPU; what is trained requires gradients, and nothing else. Training mode is the caller's to set.

    Raises:
        ConfigError: the name is of no known form, the tokenizer is not the model's, or the LoRA targets are not in it.
        CheckpointError: the folder holds no causal language model, or the hub does not give it.
    """
    model_name = os.path.expanduser(model_name)
    if adapter_folder(Path(model_name)) is not None:
        model = load_language_model(model_name, lora=lora, bf16=bf16, gradient_checkpointing=gradient_checkpointing)
        _check_tokenizer(model, tokenizer, model_name)
        return model
    dtype = torch.bfloat16 if bf16 and lora is not None else torch.float32
    if model_name == TINY:
        net: PreTrainedModel = new_tiny_llama(tokenizer, n_tokens=_n_tokens(tokenizer), seed=seed, dtype=dtype)
    else:
        net = _pretrained(_checked_name(model_name), dtype=dtype, revision=revision)
    model = _wrapped(net, lora, seed, gradient_checkpointing, revision=revision, saves_base=model_name == TINY)
    _check_tokenizer(model, tokenizer, model_name)
    return model


def load_language_model(
    folder: str | Path,
    *,
    lora: LoraSettings | None = None,
    seed: int = 0,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
) -> LanguageModel:
    """Load a model folder: of `save_language_model`, or any of transformers or of a LoRA adapter of peft.

    Args:
        folder: a full model, whose weights are then all trained; or an adapter, which is then trained on, its base frozen.
        lora: of a full model, freeze it and train a new adapter (`is_fresh_adapter`). Not read for an adapter folder.
        seed: of the new adapter.
        bf16, gradient_checkpointing: as of `build_language_model`.

    Returns:
        As `build_language_model`.

    Raises:
        CheckpointError: the folder is missing, holds no causal language model, or the base of its adapter cannot be had.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"no model folder at {str(path)!r}; give the folder that holds the model's weights")
    adapter = adapter_folder(path)
    if adapter is None:
        dtype = torch.bfloat16 if bf16 and lora is not None else torch.float32
        return _wrapped(_pretrained(str(path), dtype=dtype, revision=None), lora, seed, gradient_checkpointing)
    # Modules that are trained whole would be of another type than those around them.
    is_half = bf16 and not adapter_settings(adapter).get("modules_to_save")
    base_name, revision = base_of(adapter)
    base = _pretrained(_checked_name(base_name), dtype=torch.bfloat16 if is_half else torch.float32, revision=revision)
    net = load_adapter(base, adapter)
    _set_checkpointing(base, gradient_checkpointing)
    return LanguageModel(net, saves_base=Path(base_name) == adapter / BASE_FOLDER)


def save_language_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: str | Path, record: Mapping[str, Any]
) -> None:
    """Write a model folder; each file is replaced at once, so that a reader never sees half of one.

    Args:
        model: a `LanguageModel`, perhaps compiled. Of one with an adapter, the adapter is written.
        tokenizer: written beside it.
        path: the folder; made when missing. A model of the other kind in it (adapter or full) is replaced.
        record: how the model was made (JSON-able: NaN becomes null, anything else its string), as `record.json`.

    Raises:
        CheckpointError: the model is no `LanguageModel`.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled module wraps the one that it was made from
    if not isinstance(model, LanguageModel):
        raise CheckpointError(f"cannot save a {type(model).__name__}: only a LanguageModel can be loaded again")
    net = model.net
    with replaced_files(path, record) as scratch, quiet():
        if isinstance(net, PeftModel):
            write_adapter(net, scratch, with_base=model.saves_base)
        else:
            weights = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
            net.save_pretrained(scratch, state_dict=weights)
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):  # a loader would take the folder for the adapter's
                (Path(path) / name).unlink(missing_ok=True)
        tokenizer.save_pretrained(str(scratch))


def _wrapped(
    net: PreTrainedModel,
    lora: LoraSettings | None,
    seed: int,
    gradient_checkpointing: bool,
    *,
    revision: str | None = None,
    saves_base: bool = False,
) -> LanguageModel:
    _set_checkpointing(net, gradient_checkpointing)
    if lora is None:
        return LanguageModel(net.requires_grad_(True))
    adapted = new_adapter(net, lora, seed=seed, revision=revision)
    return LanguageModel(adapted, is_fresh_adapter=True, saves_base=saves_base)


def _set_checkpointing(net: PreTrainedModel, is_on: bool) -> None:
    if is_on:
        net.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def _pretrained(name: str, *, dtype: torch.dtype, revision: str | None) -> PreTrainedModel:
    settings: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False, **_revision(name, revision)}
    net = offline_first(AutoModelForCausalLM.from_pretrained, name, wanted=_WANTED, **settings)
    if getattr(net, "_hf_peft_config_loaded", False):
        raise CheckpointError(f"{name!r} is an adapter on the hub, not a model; download it, and give its folder")
    if os.path.isdir(name):
        net.name_or_path = net.config._name_or_path = os.path.abspath(name)  # an adapter notes it as its base
    return cast(PreTrainedModel, net)


def _config(name: str, *, revision: str | None) -> Any:
    return offline_first(
        AutoConfig.from_pretrained, name, wanted="the configuration of", trust_remote_code=False, **_revision(name, revision)
    )


def _tokenizer(name: str, *, revision: str | None) -> PreTrainedTokenizerBase:
    tokenizer = offline_first(
        AutoTokenizer.from_pretrained, name, wanted="the tokenizer of", trust_remote_code=False, **_revision(name, revision)
    )
    return cast(PreTrainedTokenizerBase, tokenizer)


def _revision(name: str, revision: str | None) -> dict[str, Any]:
    return {} if revision is None or os.path.isdir(name) else {"revision": revision}


def _checked_name(name: str) -> str:
    if not os.path.isdir(name) and not is_hub_name(name):
        raise ConfigError(f"unknown model {name!r}: give {TINY}, a hub name owner/model or a folder that exists")
    return name


def _n_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    return 1 + max(tokenizer.get_vocab().values())  # `len` is less where ids have gaps


def _check_tokenizer(model: LanguageModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    n_rows, n_tokens = len(embedding_of(model.base)), _n_tokens(tokenizer)
    if n_tokens > n_rows:
        raise ConfigError(
            f"the tokenizer has {n_tokens} tokens, but the embedding of {name!r} has {n_rows} rows; "
            "give the model's own tokenizer"
        )
