"""A sweep in one dict: what summary.json holds and what the report's first lines say."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hamu.reports.cost import wall_seconds
from hamu.reports.hypervolume import hypervolume
from hamu.reports.rows import Row, is_finite, status_of
from hamu.reports.tables import pareto_front, recommended
from hamu.reports.timing import is_timing, timing_rows
from hamu.reports.views import not_compared, view_of
from hamu.training.records import SPLITS

PARETO_COLUMNS = (
    "trial_id", "method", "learning_rate", "constraint_ratio", "relative_constraint", "forget_set", "rho", "seed",
    "steps", "stop_reason", "train_s",
    "forget_closeness", "forget_quality", "retain_utility",
    *(f"{split}_{metric}" for split in SPLITS for metric in ("accuracy", "loss")),
    "forget_test_loss_auc", "model_path",
)  # fmt: skip


def summarise(
    rows: Sequence[Row],
    *,
    name: str,
    space: str,
    task: str,
    slots: int | None,
    hardware: Mapping[str, Any] | str | None = None,
    cost: Mapping[str, Any] | None = None,
    runs: Sequence[Mapping[str, float]] = (),
) -> dict[str, Any]:
    """Count, time and rank the trials of a sweep.

    Args:
        rows: one dict a trial, columns of TRIAL_SCHEMA.
        name, space, task: of the sweep.
        slots: trials that ran at once.
        hardware: what it ran on, in words or as a dict.
        cost: what `hamu.reports.cost.cost_of` said of it.
        runs: when each run of the sweep ran trials, as `hamu.reports.cost.wall_seconds` takes it.

    Returns:
        A dict of plain JSON values (what is not finite is null), among them
        `wall_s`: seconds in which trials ran, summed over the runs of the sweep; without `runs` from the first trial's start to
        the last one's end, a resumed sweep's pauses included; `train_s`: summed over the trials;
        `trials`: total = finished + failed + pruned; the early-stopped ones are finished ones;
        `dropped`: trials besides these that never ran; `pruned_at_start`: pruned ones that took no step;
        `infeasible`: trials that stopped infeasible, `infeasible_at_start`: those of them that took no step;
        `gradient_product` (S) and `max_constraint_ratio`, both at the first step: median over the trials, and `_range`;
        `not_compared`: ids of trials that lack the comparison with a retrained model that others have;
        `view`: "reference" where all trials were compared with one, else "paper"; what follows is in its axes:
        `hypervolume` (null where the number of classes is not known) from the point `hypervolume_reference`,
        `pareto`: trials by rising forgetting; `recommended`: the setting to use, or null;
        `timing`: of a sweep that measured times alone, a row a method (`timing_rows`); else null. `cost`: as given.
    """
    statuses = [status_of(row) for row in rows]
    infeasible = [row for row in rows if row.get("stop_reason") == "infeasible"]
    view = view_of(rows)
    chosen = recommended(rows, view)
    corner = view.reference_point(rows)
    counts = {status: statuses.count(status) for status in ("finished", "failed", "pruned")}
    early = [
        row for row, status in zip(rows, statuses, strict=True)
        if status == "finished" and row.get("stop_reason") not in (None, "", "finished")
    ]  # fmt: skip
    return {
        "name": name,
        "space": space,
        "task": task,
        "slots": slots,
        "hardware": hardware,
        "view": view.name,
        "not_compared": not_compared(rows),
        "wall_s": wall_seconds(rows, runs),
        "train_s": sum(_finite(rows, "train_s")),
        "trials": {
            "total": sum(counts.values()),
            "finished": counts["finished"],
            "failed": counts["failed"],
            "early_stopped": len(early),
            "pruned": counts["pruned"],
        },
        "dropped": statuses.count("dropped"),
        "pruned_at_start": sum(row.get("steps") == 0 for row, status in zip(rows, statuses, strict=True) if status == "pruned"),
        "infeasible": len(infeasible),
        "infeasible_at_start": sum(row.get("steps") == 0 for row in infeasible),
        **_median_and_range(rows, "gradient_product"),
        **_median_and_range(rows, "max_constraint_ratio"),
        "hypervolume": hypervolume(rows, view),
        "hypervolume_reference": None if corner is None else list(corner),
        "recommended": None if chosen is None else _pareto_entry(chosen),
        "pareto": [_pareto_entry(row) for row in pareto_front(rows, view)],
        "timing": timing_rows(rows) if is_timing(rows) else None,
        "cost": None if cost is None else dict(cost),
    }


def not_compared_text(summary: Mapping[str, Any], *, most: int = 5) -> str:
    """Which trials keep a summary from the reference view, in a line; empty where none does. most: ids that are named."""
    ids = list(summary.get("not_compared") or ())
    if not ids:
        return ""
    named = ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")
    trials = "1 trial" if len(ids) == 1 else f"{len(ids)} trials"
    return f"{trials} could not be compared with a retrained model, so the paper view is shown: {named}"


def _finite(rows: Iterable[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows if is_finite(row.get(name))]


def _median_and_range(rows: Iterable[Row], name: str) -> dict[str, Any]:
    values = _finite(rows, name)
    if not values:
        return {name: None, f"{name}_range": None}
    return {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}


def _pareto_entry(row: Row) -> dict[str, Any]:
    entry = {name: row.get(name) for name in PARETO_COLUMNS}
    return {key: None if isinstance(value, float) and not is_finite(value) else value for key, value in entry.items()}
