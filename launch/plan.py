"""The plan of a sweep: every trial's configuration, checked, before anything starts. Written as sweep.json, read to resume."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hamu.errors import ConfigError, HamuError
from hamu.tasks.catalog import modality_of
from hamu.training.config import ALIASES, KNOWN, TrainConfig
from hamu.training.fields import merge_known, read_value, unknown_key
from hamu.training.run_settings import DATASET_PARTS
from launch.pairing import check_one_value
from tune_spaces.space import METHOD, ORIGINAL_PREFIX, Space

FORMAT = 1
_PACKAGES = ("hamu-sweeps", "ray", "torch", "transformers", "numpy", "pyarrow")

# What a sweep decides itself, and the flag that says it.
_DECIDED = {
    "artifact_root": "--storage-path", "output_dir": "--name", "final_model_output_dir": "--name", "resume": "--resume",
    "dry_run": "--dry-run", "fetch": "--fetch", "device": "--gpus (0 for the cores)", "debug": "no flag",
    "ray_address": "no flag",
}  # fmt: skip

# What the original shares with the trials that start from it. Not rho: as published, every rho starts from rho 0.
_SHARED = (
    "modality", "model_name", "model_revision", "num_labels", "img_size", "seed", "forget_class", "dataset_cache_dir",
    "dataset_revision", "forget_pct", "add_duplicate_to_retain", "strict", "chat_template", "max_length",
    *(f"{kind}dataset_{part}" for kind in ("", "forget_", "duplicate_", "test_") for part in DATASET_PARTS),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """A trial: its id, its settings, and the key of the original that it starts from."""

    trial_id: str
    config: Mapping[str, Any]
    original: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sweep runs. The trials' settings go on top of `defaults`, so that a resumed sweep does not follow new defaults."""

    name: str
    space: str
    task: str
    summary: str
    created_at: float
    overrides: Mapping[str, Any]
    defaults: Mapping[str, Any]
    trials: tuple[PlannedTrial, ...]
    originals: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    root: Path

    def config(self, trial: PlannedTrial) -> TrainConfig:
        """A trial's whole configuration."""
        return self._whole(trial.config)

    def original(self, key: str) -> TrainConfig:
        """The configuration that an original is trained with."""
        return self._whole(self.originals[key])

    def _whole(self, config: Mapping[str, Any]) -> TrainConfig:
        return TrainConfig.from_flat({**self.defaults, **config, "artifact_root": str(self.root)})

    @cached_property
    def configs(self) -> dict[str, TrainConfig]:
        """Whole configurations by trial id."""
        return {trial.trial_id: self.config(trial) for trial in self.trials}

    def datasets(self) -> dict[str, TrainConfig]:
        """One configuration for each dataset that the trials use, by `data_key`."""
        return {data_key(config): config for config in self.configs.values()}

    def to_json(self) -> dict[str, Any]:
        """The content of sweep.json."""
        return {
            "format": FORMAT,
            "name": self.name,
            "space": self.space,
            "task": self.task,
            "summary": self.summary,
            "created_at": self.created_at,
            "overrides": {key: list(values) for key, values in self.overrides.items()},
            "versions": dict(self.versions),
            "originals": {key: dict(config) for key, config in self.originals.items()},
            "trials": [
                {"trial_id": trial.trial_id, "original": trial.original, "config": dict(trial.config)} for trial in self.trials
            ],
            "defaults": dict(self.defaults),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], root: Path) -> Plan:
        """Read a sweep.json; `root` is the artifact root that it lies under now."""
        if stored["format"] != FORMAT:
            raise KeyError(f"format {stored['format']}")
        known = {name: value for name, value in stored["defaults"].items() if name in KNOWN}
        return cls(
            **{name: stored[name] for name in ("name", "space", "task", "summary", "created_at", "versions", "originals")},
            overrides={key: tuple(values) for key, values in stored["overrides"].items()},
            defaults=known,
            trials=tuple(PlannedTrial(**trial) for trial in stored["trials"]),
            root=root,
        )


def make_plan(space: Space, *, name: str, overrides: Mapping[str, tuple[Any, ...]], root: Path) -> Plan:
    """Lay out a space's trials and check each.

    Raises:
        ConfigError: a trial's settings are wrong; the message names the trial where it is one of several.
    """
    for key, values in overrides.items():
        check_one_value(key, values)
    space = space.with_overrides(overrides)
    defaults = TrainConfig.from_flat({"modality": _modality(space)}).to_flat()
    originals: dict[str, dict[str, Any]] = {}
    trials = []
    for trial in space.trials():
        config = merge_known(trial.config, KNOWN, ALIASES)
        whole = TrainConfig.from_flat(config)
        if not whole.is_unlearning:
            raise ConfigError(f"space {space.name!r}: trial {trial.trial_id} has no {METHOD}; give one, e.g. --set method=hamu-q")
        original = original_settings(config, space.original)
        key = TrainConfig.from_flat(original).recipe_hash()
        originals.setdefault(key, original)
        trials.append(PlannedTrial(trial_id=trial.trial_id, config=config, original=key))
    return Plan(
        name=name,
        space=space.name,
        task=space.task,
        summary=space.summary,
        created_at=time.time(),
        overrides=dict(overrides),
        defaults={key: value for key, value in defaults.items() if key not in _DECIDED},
        trials=tuple(trials),
        originals=originals,
        versions=_versions(),
        root=root,
    )


def _modality(space: Space) -> str:
    """The one kind of data of a space's trials.

    Raises:
        ConfigError: it has several.
    """
    kinds = sorted({str(trial.config.get("modality", "vision")) for trial in space.trials()})
    if len(kinds) > 1:
        raise ConfigError(f"modality {', '.join(kinds)}: a sweep has one kind of data; run one sweep for each")
    return kinds[0]


def original_settings(trial: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the original of a trial: trained on all rows, with rho 0, on what the two share."""
    shared = {name: trial[name] for name in _SHARED if name in trial}
    fixed = {METHOD: "none", "add_forget_to_train": True, "hard_probability": 0.0}
    return {**shared, **fixed, **merge_known(extra, KNOWN, ALIASES)}


def read_overrides(assignments: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """Read `--set` arguments, "key=value" or "key=value,value"; the last one of a key counts.

    Raises:
        ConfigError: no "=", an unknown key (the nearest is named), a value that does not fit, or a key that the sweep decides.
    """
    overrides: dict[str, tuple[Any, ...]] = {}
    for assignment in assignments:
        raw, equals, text = assignment.partition("=")
        if not equals or not raw.strip():
            raise ConfigError(f"--set {assignment!r}: a setting is key=value, or key=value,value for an axis")
        prefix = ORIGINAL_PREFIX if raw.strip().startswith(ORIGINAL_PREFIX) else ""
        key = raw.strip().removeprefix(prefix).replace("-", "_")
        key = ALIASES.get(key, key)
        if key not in KNOWN:
            raise ConfigError(unknown_key(key, (*KNOWN, *ALIASES), prefix=prefix))
        if key in _DECIDED:
            raise ConfigError(f"--set {key}: the sweep decides it; use {_DECIDED[key]}")
        kind, optional = KNOWN[key]
        parts = [text] if kind is list else [part.strip() for part in text.split(",")]
        if kind is not list and "" in parts:
            raise ConfigError(f"--set {assignment!r}: a value is empty; give {key}=value, or key=value,value for an axis")
        values = tuple(read_value(key, part, kind, optional) for part in parts)
        overrides[prefix + key] = tuple(dict.fromkeys(values)) if kind is not list else values
    return overrides


def data_key(config: TrainConfig) -> str:
    """Eight hex digits that configurations on the same rows share (the forget set apart)."""
    flat = config.to_flat()
    data = {name: flat[name] for name in modality_of(config).data_settings}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]


def trial_columns(plan: Plan) -> tuple[str, ...]:
    """The settings that differ between the trials that have them, the method first: what a table of them shows."""
    keys = dict.fromkeys(key for trial in plan.trials for key in trial.config)
    given = {key: {json.dumps(trial.config[key]) for trial in plan.trials if key in trial.config} for key in keys}
    varying = [key for key in keys if len(given[key]) > 1]
    return (METHOD, *(key for key in varying if key != METHOD))


def said_once(plan: Plan) -> list[str]:
    """What the configurations warn of, each line once."""
    return list(dict.fromkeys(line for config in plan.configs.values() for line in config.warnings()))


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


__all__ = [
    "HamuError", "Plan", "PlannedTrial", "data_key", "make_plan", "original_settings", "read_overrides", "said_once",
    "trial_columns",
]  # fmt: skip
