"""A sweep in one dict: what summary.json holds and what the report's first lines say."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hamu.reports.tables import Row, is_finite, pareto_front, recommended, status_of
from hamu.training.records import SPLITS

PARETO_COLUMNS = (
    "trial_id", "method", "learning_rate", "constraint_ratio", "rho", "seed", "steps", "stop_reason", "train_s",
    "forget_quality", "retain_utility", *(f"{split}_{metric}" for split in SPLITS for metric in ("accuracy", "loss")),
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
) -> dict[str, Any]:
    """Count, time and rank the trials of a sweep.

    Args:
        rows: one dict a trial, columns of TRIAL_SCHEMA.
        name, space, task: of the sweep.
        slots: trials that ran at once.
        hardware: what it ran on, in words or as a dict.

    Returns:
        A dict of plain JSON values (what is not finite is null), among them
        `wall_s`: from the first trial's start to the last one's end; `train_s`: summed over the trials;
        `trials`: total = finished + failed + pruned; the early-stopped ones are finished ones;
        `infeasible`: trials that stopped infeasible, `infeasible_at_start`: those of them that took no step;
        `gradient_product` (S) and `max_constraint_ratio`, both at the first step: median over the trials, and `_range`;
        `pareto`: trials by rising forget_quality; `recommended`: the setting to use, or null; `view`: "paper".
    """
    statuses = [status_of(row) for row in rows]
    starts, ends = _finite(rows, "started_at"), _finite(rows, "ended_at")
    infeasible = [row for row in rows if row.get("stop_reason") == "infeasible"]
    chosen = recommended(rows)
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
        "view": "paper",
        "wall_s": max(ends) - min(starts) if starts and ends else None,
        "train_s": sum(_finite(rows, "train_s")),
        "trials": {
            "total": sum(counts.values()),
            "finished": counts["finished"],
            "failed": counts["failed"],
            "early_stopped": len(early),
            "pruned": counts["pruned"],
        },
        "infeasible": len(infeasible),
        "infeasible_at_start": sum(row.get("steps") == 0 for row in infeasible),
        **_median_and_range(rows, "gradient_product"),
        **_median_and_range(rows, "max_constraint_ratio"),
        "recommended": None if chosen is None else _pareto_entry(chosen),
        "pareto": [_pareto_entry(row) for row in pareto_front(rows)],
    }


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
