"""The plan of a sweep: every trial's configuration, checked, before anything starts. Written as sweep.json, read to resume."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hamu.errors import ConfigError, HamuError
from hamu.tasks.catalog import modality_of
from hamu.training.config import ALIASES, KNOWN, TrainConfig
from hamu.training.fields import merge_known
from hamu.training.run_settings import DATASET_PARTS
from launch.overrides import DECIDED, read_overrides
from launch.pairing import check_one_value
from tune_spaces.scale import FULL
from tune_spaces.search import SearchSettings
from tune_spaces.space import METHOD, Space

FORMAT = 1
_PACKAGES = ("hamu-sweeps", "ray", "torch", "transformers", "numpy", "pyarrow")

# What says which rows of the same data a trial forgets.
_FORGET_SET = ("forget_class", "hard_probability", "split_ratio")

# What the original shares with the trials that start from it. Not rho: as published, every rho starts from rho 0.
_SHARED = (
    "modality", "model_name", "model_revision", "num_labels", "img_size", "seed", "forget_class", "dataset_cache_dir",
    "dataset_revision", "forget_pct", "add_duplicate_to_retain", "strict", "chat_template", "max_length",
    *(f"{kind}dataset_{part}" for kind in ("", "forget_", "duplicate_", "test_") for part in DATASET_PARTS),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """A trial: its id, its settings, the key of the original that it starts from, and that of the retain-only model of its
    forget set where the sweep has references."""

    trial_id: str
    config: Mapping[str, Any]
    original: str
    reference: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sweep may run: every trial, literally, of which a search can choose some.

    The trials' settings go on top of `defaults`, so that a resumed sweep does not follow new defaults. script, published: the
    published script that the space stands for and its number of trials. references: the training of retain-only models.
    extensions: overrides that trials were added with later. gone: keys of trials that the space does not give any more.
    """

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
    script: str | None = None
    published: int | None = None
    scale: str = FULL
    references: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    search: SearchSettings = field(default_factory=SearchSettings)
    extensions: tuple[Mapping[str, Any], ...] = ()
    gone: tuple[str, ...] = ()

    def config(self, trial: PlannedTrial) -> TrainConfig:
        """A trial's whole configuration."""
        return self._whole(trial.config)

    def original(self, key: str) -> TrainConfig:
        """The configuration that an original is trained with."""
        return self._whole(self.originals[key])

    def reference(self, key: str) -> TrainConfig:
        """The configuration that a retain-only model is trained with."""
        return self._whole(self.references[key])

    @property
    def n_to_run(self) -> int:
        """How many of the trials run at most: all of them, or as many as the search may try."""
        return self.search.budget(len(self.trials))

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
            "script": self.script,
            "published": self.published,
            "scale": self.scale,
            "search": asdict(self.search),
            "extensions": [{key: list(values) for key, values in each.items()} for each in self.extensions],
            "gone": list(self.gone),
            "originals": {key: dict(config) for key, config in self.originals.items()},
            "references": {key: dict(config) for key, config in self.references.items()},
            "trials": [
                {
                    "trial_id": trial.trial_id,
                    "original": trial.original,
                    "reference": trial.reference,
                    "config": dict(trial.config),
                }
                for trial in self.trials
            ],
            "defaults": dict(self.defaults),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], root: Path) -> Plan:
        """Read a sweep.json; `root` is the artifact root that it lies under now.

        What an older one does not say is what it meant then: the whole grid at full scale, without references.
        """
        if stored["format"] != FORMAT:
            raise KeyError(f"format {stored['format']}")
        known = {name: value for name, value in stored["defaults"].items() if name in KNOWN}
        later = {name: stored[name] for name in ("script", "published", "scale", "references") if name in stored}
        extensions = ({key: tuple(values) for key, values in each.items()} for each in stored.get("extensions", []))
        return cls(
            **{name: stored[name] for name in ("name", "space", "task", "summary", "created_at", "versions", "originals")},
            overrides={key: tuple(values) for key, values in stored["overrides"].items()},
            defaults=known,
            trials=tuple(PlannedTrial(**trial) for trial in stored["trials"]),
            root=root,
            search=SearchSettings(**stored.get("search", {})),
            extensions=tuple(extensions),
            gone=tuple(stored.get("gone", [])),
            **later,
        )


def make_plan(
    space: Space,
    *,
    name: str,
    overrides: Mapping[str, tuple[Any, ...]],
    root: Path,
    scale: str = FULL,
    search: SearchSettings | None = None,
    with_reference: bool | None = None,
) -> Plan:
    """Lay out a space's trials and check each.

    Args:
        space: what is tried.
        name: of the sweep.
        overrides: as `read_overrides` gives them; they win over the scale.
        root: artifact root.
        scale: a key of `tune_spaces.scale.SCALES`.
        search: how trials are chosen; None: as the space says.
        with_reference: whether the retain-only model of each forget set is trained too; None: as the space says.

    Raises:
        ConfigError: a trial's settings are wrong; the message names the trial where it is one of several.
    """
    for key, values in overrides.items():
        check_one_value(key, values)
    space = space.scaled(scale, overrides)
    if search is None:
        search = search_of(space)
    wants_references = space.with_reference if with_reference is None else with_reference
    defaults = TrainConfig.from_flat({"modality": _modality(space)}).to_flat()
    originals: dict[str, dict[str, Any]] = {}
    references: dict[str, dict[str, Any]] = {}
    keys = _Keys()
    trials = []
    for trial in space.trials():
        config = merge_known(trial.config, KNOWN, ALIASES)
        whole = TrainConfig.from_flat(config)
        if not whole.is_unlearning:
            raise ConfigError(f"space {space.name!r}: trial {trial.trial_id} has no {METHOD}; give one, e.g. --set method=hamu-q")
        original = original_settings(config, space.original)
        key = keys.of(original)
        originals.setdefault(key, original)
        reference = None
        if wants_references:
            settings = reference_settings(config, original)
            reference = keys.of(settings)
            references.setdefault(reference, settings)
        trials.append(PlannedTrial(trial_id=trial.trial_id, config=config, original=key, reference=reference))
    return Plan(
        name=name,
        space=space.name,
        task=space.task,
        summary=space.summary,
        created_at=time.time(),
        overrides=dict(overrides),
        defaults={key: value for key, value in defaults.items() if key not in DECIDED},
        trials=tuple(trials),
        originals=originals,
        versions=_versions(),
        root=root,
        script=space.script,
        published=space.published,
        scale=scale,
        references=references,
        search=search,
    )


class _Keys:
    """Recipe hashes of trainings, which many trials share; each is found once."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    def of(self, settings: Mapping[str, Any]) -> str:
        text = json.dumps(settings, sort_keys=True)
        if text not in self._found:
            self._found[text] = TrainConfig.from_flat(settings).recipe_hash()
        return self._found[text]


def search_of(space: Space) -> SearchSettings:
    """How a space says that its trials are chosen.

    Raises:
        ConfigError: a name in it is unknown.
    """
    return SearchSettings(name=space.search, scheduler=space.scheduler, score=space.score)


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


def reference_settings(trial: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the retain-only model of a trial: as its original, on the rows that the trial does not forget."""
    return {**original, "add_forget_to_train": False, **{name: trial[name] for name in _FORGET_SET if name in trial}}


def key_of(trial_id: str) -> str:
    """What names a trial whatever its number: its method and the hash of its settings."""
    return trial_id.partition("-")[2]


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
    "HamuError", "Plan", "PlannedTrial", "data_key", "key_of", "make_plan", "original_settings", "read_overrides", "said_once",
    "trial_columns",
]  # fmt: skip
