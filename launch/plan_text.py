"""A plan in words: what `--list` and `--dry-run` print. Pure: text in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launch.machine import Machine, Slots
from launch.plan import Plan, PlannedTrial, said_once, trial_columns
from tune_spaces.space import METHOD, Space

_SHORT = {"learning_rate": "lr", "constraint_ratio": "ratio", "hard_probability": "rho", "num_train_epochs": "epochs"}


def setting_words(trial: PlannedTrial, columns: Iterable[str]) -> str:
    """A trial's settings in a few words, those of `columns` that it has."""
    words = [str(trial.config.get(METHOD))]
    for key in columns:
        if key != METHOD and trial.config.get(key) is not None:
            words.append(f"{_SHORT.get(key, key)} {_text(trial.config[key])}")
    return ", ".join(words)


def spaces_text(spaces: Iterable[Space]) -> str:
    """One line a space: name, number of trials, summary."""
    rows = [(space.name, f"{len(space.trials())} trials", space.summary) for space in spaces]
    return "\n".join(_aligned(rows))


def plan_text(plan: Plan, *, machine: Machine, slots: Slots, folder: str, finished: int = 0) -> str:
    """What would run, on what, and where it would be written; the last line is `trials: N`."""
    columns = trial_columns(plan)
    header = ("trial", *(_SHORT.get(key, key.removeprefix("unlearning_")) for key in columns))
    rows = [header, *((trial.trial_id, *(_text(trial.config.get(key)) for key in columns)) for trial in plan.trials)]
    lines = [f"space      {plan.space}: {plan.summary}", f"results    {folder}", f"machine    {machine.describe()}"]
    lines.append(f"slots      {slots.describe()}")
    lines += [f"warning    {slots.warning}"] if slots.warning else []
    for key, config in plan.originals.items():
        lines.append(f"original   {key}: {', '.join(f'{name} {_text(value)}' for name, value in _shown(config).items())}")
    lines += [f"set        {key} {', '.join(map(_text, values))}" for key, values in plan.overrides.items()]
    lines += [f"shared     {name} {_text(value)}" for name, value in _same(plan, columns).items()]
    lines += [f"note       {line}" for line in said_once(plan)]
    if finished:
        lines.append(f"finished   {finished} of {len(plan.trials)}; the others would run")
    return "\n".join([*lines, "", *_aligned(rows), "", f"trials: {len(plan.trials)}"])


def _same(plan: Plan, columns: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in plan.trials[0].config.items() if key not in set(columns)}


def _shown(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in (METHOD, "add_forget_to_train", "hard_probability")}


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
