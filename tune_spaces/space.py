"""What a sweep tries: a frozen literal that lists every trial before anything runs.

A space is one file, `tune_spaces/<task>/<sweep>.py`, with one `SPACE = Space(...)`:

    base      settings that all trials share
    grids     each a product of axes; the trials are their union, in order
    original  settings of the model that the trials start from, trained once

The settings are the flags of `python -m hamu.cli.train`. Nothing here knows what they mean: the plan checks each trial.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hamu.errors import ConfigError, unknown
from hamu.methods.names import HAMU_METHODS
from tune_spaces.scale import SCALES, is_embedded

METHOD = "unlearning_method"
RATIO = "constraint_ratio"
ORIGINAL_PREFIX = "original."
_PLACES = frozenset({"artifact_root", "dataset_cache_dir", "output_dir", "final_model_output_dir"})


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting to try: a stable id and the flat configuration."""

    trial_id: str
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Space:
    """The trials of a sweep.

    Args:
        name: "<task>/<sweep>", as its file is called.
        summary: one line for `--list`.
        base: flag -> value, for every trial.
        grids: flag -> values; each mapping is a product (the first axis varies slowest), all together are a union.
        original: flag -> value, on top of the trial's data and model settings, to train the original with.
        script: name of the published script that the space stands for.
        published: number of its trials.
        search: how trials are chosen from the list, a name in `tune_spaces.search`; grid: all, in order.
        scheduler: what ends trials early by comparing them, a name in `tune_spaces.search`.
        score: the one number that a scheduler compares: a column of the rows, "-column" to minimise it, or balance.
        with_reference: also train the retain-only model of each forget set, which forgetting is then measured against.
    """

    name: str
    summary: str
    base: Mapping[str, Any]
    grids: tuple[Mapping[str, tuple[Any, ...]], ...]
    original: Mapping[str, Any] = field(default_factory=dict)
    script: str | None = None
    published: int | None = None
    search: str = "grid"
    scheduler: str | None = None
    score: str = "balance"
    with_reference: bool = False

    def __post_init__(self) -> None:
        if self.name.count("/") != 1:
            raise ConfigError(f"space name {self.name!r} must be '<task>/<sweep>', as its file in tune_spaces/ is called")
        for grid in self.grids:
            for key, values in grid.items():
                if not isinstance(values, tuple) or not values:
                    raise ConfigError(f"space {self.name!r}: axis {key!r} must be a tuple of at least one value, got {values!r}")
        if not self.grids:
            raise ConfigError(f"space {self.name!r} has no grids, so no trials; give at least one, ({{}},) for a single trial")

    @property
    def task(self) -> str:
        """The first half of the name."""
        return self.name.split("/")[0]

    @property
    def sweep(self) -> str:
        """The second half of the name."""
        return self.name.split("/")[1]

    @property
    def keys(self) -> frozenset[str]:
        """All flags that a trial of this space sets."""
        return frozenset(self.base).union(*self.grids)

    def trials(self) -> list[Trial]:
        """List the trials, each setting once; the same space always gives the same ids."""
        trials: dict[str, Trial] = {}
        for grid in self.grids:
            for values in itertools.product(*grid.values()):
                config = {**self.base, **dict(zip(grid, values, strict=True))}
                digest = _digest(config)
                if digest not in trials:
                    method = config.get(METHOD, "none")
                    trials[digest] = Trial(trial_id=f"{len(trials):04d}-{method}-{digest[:8]}", config=config)
        return list(trials.values())

    def with_overrides(self, overrides: Mapping[str, tuple[Any, ...]]) -> Space:
        """Set flags: several values make an axis, one value fixes it.

        A flag that is an axis of some grids is replaced in those; any other is set for all trials. Methods are
        chosen among the grids: each grid keeps the ones asked for that it has, and a method that no grid has goes
        into the first grid of its kind (with a constraint ratio for HAMU, without one for the others).
        `original.<flag>` takes one value and changes the training of the original.
        """
        space = self
        for key, values in overrides.items():
            if key.startswith(ORIGINAL_PREFIX):
                if len(values) != 1:
                    raise ConfigError(f"{key}={','.join(map(str, values))}: the original takes one value; give one")
                space = replace(space, original={**space.original, key.removeprefix(ORIGINAL_PREFIX): values[0]})
            elif key == METHOD:
                space = replace(space, grids=_choose_methods(space, values))
            elif any(key in grid for grid in space.grids):
                space = replace(space, grids=tuple({**grid, key: values} if key in grid else grid for grid in space.grids))
            elif len(values) == 1:
                space = replace(space, base={**space.base, key: values[0]})
            else:
                space = replace(space, grids=tuple({**grid, key: values} for grid in space.grids))
        return space

    def scaled(self, name: str, overrides: Mapping[str, tuple[Any, ...]] | None = None) -> Space:
        """The same experiment at another size, trial by trial and in the same order, with the overrides as they are given.

        Args:
            name: a key of `SCALES`; "full" changes nothing, nor does any where the space is on embedded data.
            overrides: as of `with_overrides`; what they set is not scaled.

        Raises:
            ConfigError: there is no such scale, or an override does not fit.
        """
        if name not in SCALES:
            raise ConfigError(unknown("scale", name, SCALES))
        overrides = overrides or {}
        space, scale = self.with_overrides(overrides), SCALES[name]
        if scale is None or is_embedded([trial.config for trial in self.trials()]):
            return space
        configs = [trial.config for trial in space.trials()]
        changed, original = scale(configs)
        kept = {key.removeprefix(ORIGINAL_PREFIX) for key in overrides if key.startswith(ORIGINAL_PREFIX)}
        pairs = zip(configs, changed, strict=True)
        grids = tuple({key: (value,) for key, value in _keeping(old, new, overrides).items()} for old, new in pairs)
        return replace(space, base={}, grids=grids, original=_keeping(space.original, original, kept))


def _keeping(old: Mapping[str, Any], new: Mapping[str, Any], kept: Collection[str]) -> dict[str, Any]:
    """`new`, but for the flags in `kept`, which are as in `old`."""
    return {key: value for key, value in new.items() if key not in kept} | {key: old[key] for key in kept if key in old}


def _choose_methods(space: Space, methods: tuple[Any, ...]) -> tuple[Mapping[str, tuple[Any, ...]], ...]:
    had = [grid.get(METHOD, (space.base[METHOD],) if METHOD in space.base else ()) for grid in space.grids]
    chosen = [[method for method in methods if method in names] for names in had]
    for method in methods:
        if not any(method in names for names in chosen):
            is_hamu = method in HAMU_METHODS
            kin = [i for i, grid in enumerate(space.grids) if (RATIO in grid) == is_hamu] or [0]
            chosen[kin[0]].append(method)
    return tuple({**grid, METHOD: tuple(names)} for grid, names in zip(space.grids, chosen, strict=True) if names)


def _digest(config: Mapping[str, Any]) -> str:
    settings = {key: value for key, value in config.items() if key not in _PLACES}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def list_spaces(root: Path | None = None) -> list[str]:
    """Names of the spaces that have a file, sorted."""
    root = root or Path(__file__).parent
    return sorted(f"{path.parent.name}/{path.stem}" for path in root.glob("*/*.py") if not path.stem.startswith("_"))


def find_space(name: str | None, task: str | None = None, *, names: Iterable[str] | None = None) -> str:
    """Complete a space's name: "<task>/<sweep>", or "<sweep>" where one task alone has it.

    Raises:
        ConfigError: no such space, or several.
    """
    known = list(list_spaces() if names is None else names)
    if task is not None:
        tasks = sorted({full.split("/")[0] for full in known})
        if task not in tasks:
            raise ConfigError(unknown("task", task, tasks))
        known = [full for full in known if full.startswith(f"{task}/")]
    if name is None:
        found = known
    else:
        wanted = name.removesuffix(".py").replace("-", "_")
        found = [full for full in known if wanted in (full, full.split("/")[1])]
        if not found:
            raise ConfigError(unknown("space", name, known))
    if len(found) > 1:
        raise ConfigError(f"{len(found)} spaces fit; choose one with --space: {', '.join(found)}")
    return found[0]


def load_space(name: str) -> Space:
    """Import a space by its full name.

    Raises:
        ConfigError: no such space, or its file defines no `SPACE` of that name.
    """
    known = list_spaces()
    if name not in known:
        raise ConfigError(unknown("space", name, known))
    try:
        module = importlib.import_module(f"tune_spaces.{name.replace('/', '.')}")
    except ConfigError:
        raise
    except Exception as error:  # of code that a user has written
        raise ConfigError(f"tune_spaces/{name}.py cannot be read ({type(error).__name__}: {error}); mend it there") from error
    space = getattr(module, "SPACE", None)
    if not isinstance(space, Space) or space.name != name:
        raise ConfigError(f"tune_spaces/{name}.py must define SPACE = Space(name={name!r}, ...)")
    return space
