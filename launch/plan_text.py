"""A plan in words: what `--list` and `--dry-run` print. Pure: text in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launch.machine import Machine, Slots
from launch.plan import Plan, PlannedTrial, said_once, trial_columns
from launch.standing import Standing
from tune_spaces.scale import FULL
from tune_spaces.space import METHOD, RATIO, Space

_SHORT = {"learning_rate": "lr", "constraint_ratio": "ratio", "hard_probability": "rho", "num_train_epochs": "epochs"}
_HIDDEN = (METHOD, "add_forget_to_train")


def setting_words(trial: PlannedTrial, columns: Iterable[str]) -> str:
    """A trial's settings in a few words, those of `columns` that it has."""
    words = [str(trial.config.get(METHOD))]
    for key in columns:
        if key != METHOD and trial.config.get(key) is not None:
            words.append(f"{_SHORT.get(key, key)} {_value(trial.config, key)}")
    return ", ".join(words)


def spaces_text(spaces: Iterable[Space]) -> str:
    """One line a space: name, number of trials, summary."""
    rows = [(space.name, f"{len(space.trials())} trials", space.summary) for space in spaces]
    return "\n".join(_aligned(rows))


def plan_text(plan: Plan, *, machine: Machine, slots: Slots, folder: str, stand: Standing | None = None) -> str:
    """What would run, on what, and where it would be written; the last line is `trials: N`. stand: of a sweep to resume."""
    columns = trial_columns(plan)
    header = ("trial", *(_SHORT.get(key, key.removeprefix("unlearning_")) for key in columns))
    rows = [header, *((trial.trial_id, *(_value(trial.config, key) for key in columns)) for trial in plan.trials)]
    lines = [f"space      {plan.space}: {plan.summary}", *_published(plan), f"results    {folder}"]
    lines += [f"machine    {machine.describe()}", f"slots      {slots.describe()}", f"search     {search_words(plan)}"]
    if plan.scale != FULL:
        lines.append(f"scale      {plan.scale}: embedded data and settings that suit it; what is on embedded data already stays")
    lines += [f"warning    {slots.warning}"] if slots.warning else []
    for word, models in (("original ", plan.originals), ("reference", plan.references)):
        for key, config in models.items():
            has_rho = word == "reference" and config.get("modality") != "llm"
            hidden = _HIDDEN if has_rho else (*_HIDDEN, "hard_probability")
            shown = (f"{name} {_text(value)}" for name, value in config.items() if name not in hidden)
            lines.append(f"{word}  {key}: {', '.join(shown)}")
    lines += [f"set        {key} {', '.join(map(_text, values))}" for key, values in plan.overrides.items()]
    lines += [f"shared     {name} {_value(plan.trials[0].config, name)}" for name in _same(plan, columns)]
    lines += [f"note       {line}" for line in said_once(plan)]
    if stand is not None and stand.n_ended + stand.n_dropped:
        dropped = f"; {stand.n_dropped} dropped as infeasible" if stand.n_dropped else ""
        lines.append(f"finished   {stand.n_ended} of {stand.n_total}{dropped}; the others would run")
    return "\n".join([*lines, "", *_aligned(rows), "", f"trials: {plan.n_to_run}"])


def search_words(plan: Plan) -> str:
    """How the trials are chosen among those of the plan, in a line."""
    search, n_pool = plan.search, len(plan.trials)
    how_many = f"all {n_pool} trials" if plan.n_to_run == n_pool else f"at most {plan.n_to_run} of the {n_pool} trials below"
    words = [f"{'target' if search.target and search.name == 'grid' else search.name}: {how_many}"]
    words += [f"{name} {rule}" for name in ("target", "keep") for rule in getattr(search, name)]
    words += [f"until {search.until}"] if search.until else []
    words += [f"scheduler {search.scheduler} by {search.score}"] if search.scheduler else []
    return ", ".join(words)


def _published(plan: Plan) -> list[str]:
    if plan.script is None:
        return []
    counts = "" if plan.published in (None, len(plan.trials)) else f": {plan.published} trials; here {len(plan.trials)}"
    return [f"published  {plan.script}{counts}"]


def _value(config: Mapping[str, Any], key: str) -> str:
    """A setting as text; a ratio that is a share says so."""
    of_s = " of S" if key == RATIO and config.get("relative_constraint") and config.get(key) is not None else ""
    return _text(config.get(key)) + of_s


def _same(plan: Plan, columns: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in plan.trials[0].config.items() if key not in set(columns)}


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
