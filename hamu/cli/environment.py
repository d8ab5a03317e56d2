"""The environment names of the published scripts, read below flags in rank by the command line and by sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from hamu.training.run_settings import ADDRESS

SETTINGS_BY_NAME = {
    "METHOD": "unlearning_method",
    "LR": "learning_rate",
    "CONSTRAINT_RATIO": "constraint_ratio",
    "FORGET_CLASS": "forget_class",
    "HARD_PROBABILITY": "hard_probability",
    "NUM_GPUS": "num_workers",
    "GRADIENT_PAIRING": "gradient_pairing",
    "MODEL_NAME": "model_name",
    "DATASET_NAME": "dataset_name",
    "USE_WANDB": "use_wandb",
    "ARTIFACT_ROOT": "artifact_root",
    "BATCH_SIZE": "per_device_train_batch_size",
    "NUM_TRAIN_EPOCHS": "num_train_epochs",
    "RAY_ADDRESS": "ray_address",
}
TEXT_NAMES = {
    "FORGET_PCT": "forget_pct",
    "DUPLICATE_SPLIT": "duplicate_dataset_split",
    "ADD_DUPLICATE": "add_duplicate_to_retain",
}
"""Names that mean something for text alone; read where the modality is llm."""


class FromEnvironment(NamedTuple):
    """What the environment says: settings (text, unread), where each comes from, and lines to tell the user."""

    settings: dict[str, str]
    sources: dict[str, str]
    warnings: list[str]


def read_environment(environ: Mapping[str, str], *, modality: str = "vision") -> FromEnvironment:
    """Read the published names; an empty value counts as unset.

    The names that are for text alone (`FORGET_PCT`, `DUPLICATE_SPLIT`, `ADD_DUPLICATE`) are told to have no effect where the
    modality is not "llm".
    """
    names = SETTINGS_BY_NAME | (TEXT_NAMES if modality == "llm" else {})
    settings: dict[str, str] = {}
    sources: dict[str, str] = {}
    for name, setting in names.items():
        if environ.get(name, "").strip():
            settings[setting], sources[setting] = environ[name].strip(), f"environment {name}"
    address = settings.get("ray_address", "auto")
    if not ADDRESS.fullmatch(address):  # an address of Ray's dashboard or client, which other tools read under this name
        del settings["ray_address"], sources["ray_address"]
    warnings = [
        f"environment {name}={environ[name]}: for text, no effect on images"
        for name in TEXT_NAMES
        if name not in names and environ.get(name, "").strip() not in ("", "0")
    ]
    return FromEnvironment(settings, sources, warnings)
