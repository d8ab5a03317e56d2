"""A sweep that is resumed, and its space as it is now: another one is refused, or its new trials are added to the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hamu.errors import ConfigError
from hamu.training.config import ALIASES, KNOWN
from hamu.training.fields import merge_known
from launch.plan import Plan, PlannedTrial, key_of, make_plan, original_settings
from tune_spaces.space import ORIGINAL_PREFIX, Space, list_spaces, load_space

_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Trials by their keys. new: those that the space gives now and the plan lacks; gone: those of the plan that it does not give
    any more. originals: whether it trains the originals of trials that the plan has in another way now."""

    new: tuple[str, ...]
    gone: tuple[str, ...]
    originals: bool = False


def changes_of(plan: Plan) -> Changes:
    """What a plan's space gives now beside what it gave when the sweep began, or was extended last; nothing where the space has
    no file any more: the plan stands for itself."""
    if plan.space not in list_spaces():
        return Changes(new=(), gone=())
    now = _originals_now(plan, load_space(plan.space))
    had = {key_of(trial.trial_id): dict(plan.originals[trial.original]) for trial in plan.trials}
    return Changes(
        new=tuple(key for key in now if key not in had),
        gone=tuple(key for key in sorted(had) if key not in now and key not in plan.gone),
        originals=any(now[key] != original for key, original in had.items() if key in now),
    )


def check_unchanged(plan: Plan) -> None:
    """Refuse to go on with a plan whose space gives other trials by now.

    Raises:
        ConfigError: some are new, or gone; the message names them.
    """
    changes = changes_of(plan)
    parts = [f"{len(keys)} {word} ({_named(keys)})" for word, keys in (("new", changes.new), ("gone", changes.gone)) if keys]
    if changes.originals:
        raise ConfigError(
            f"space {plan.space!r} trains its originals in another way than when sweep {plan.name!r} began, and trials from "
            "other originals cannot be compared; put tune_spaces back as it was, or start a sweep of another --name"
        )
    if parts:
        raise ConfigError(
            f"the trials of space {plan.space!r} have changed since sweep {plan.name!r} began: {', '.join(parts)}; give --extend "
            "to add the new ones and keep the others, or put tune_spaces back as it was"
        )


def extended(plan: Plan, overrides: Mapping[str, tuple[Any, ...]]) -> Plan:
    """The plan with the trials that its space gives now, under its own settings and under new ones, added behind those it has.

    Nothing that has run is touched: trials that are gone from the space stay in the sweep, ids stay.

    Args:
        overrides: as of `make_plan`; they go on top of those that the sweep began with.

    Raises:
        ConfigError: there is no such space any more, or a setting does not fit.
    """
    if changed := [key for key in overrides if key.startswith(ORIGINAL_PREFIX)]:
        raise ConfigError(f"--extend --set {changed[0]}: a sweep keeps its originals; start one of another --name")
    space = load_space(plan.space)
    sets: list[Mapping[str, tuple[Any, ...]]] = [plan.overrides, *plan.extensions]
    if overrides:
        sets.append({**plan.overrides, **overrides})
    grown, known = plan, {key_of(trial.trial_id) for trial in plan.trials}
    for given in sets:
        more = make_plan(
            space, name=plan.name, overrides=given, root=plan.root, scale=plan.scale, search=plan.search,
            with_reference=bool(plan.references),
        )  # fmt: skip
        new = [trial for trial in more.trials if key_of(trial.trial_id) not in known]
        known |= {key_of(trial.trial_id) for trial in new}
        grown = _with(grown, more, new)
    grown = replace(grown, extensions=tuple(sets[1:]))
    return replace(grown, gone=(*plan.gone, *changes_of(grown).gone))


def _with(plan: Plan, other: Plan, new: Sequence[PlannedTrial]) -> Plan:
    """A plan with trials of another one behind its own, and the models that they need."""
    first = len(plan.trials)
    added = tuple(replace(trial, trial_id=f"{first + i:04d}-{key_of(trial.trial_id)}") for i, trial in enumerate(new))
    originals = {trial.original: other.originals[trial.original] for trial in added}
    references = {trial.reference: other.references[trial.reference] for trial in added if trial.reference is not None}
    return replace(
        plan,
        trials=(*plan.trials, *added),
        originals={**originals, **plan.originals},
        references={**references, **plan.references},
    )


def _originals_now(plan: Plan, space: Space) -> dict[str, dict[str, Any]]:
    """What the original of each trial that a space gives is trained with, by the trial's key."""
    found = {}
    for overrides in (plan.overrides, *plan.extensions):
        given = space.scaled(plan.scale, overrides)
        for trial in given.trials():
            config = merge_known(trial.config, KNOWN, ALIASES)
            found[key_of(trial.trial_id)] = original_settings(config, given.original)
    return found


def _named(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_NAMED]) + ", ..." * (len(keys) > _NAMED)
