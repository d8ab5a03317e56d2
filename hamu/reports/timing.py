"""The product of a sweep that measures times alone: training seconds and peak memory of each process, by method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from hamu.reports.rows import Row, is_finite, status_of
from hamu.training.records import SPLITS


def is_timing(rows: Sequence[Row]) -> bool:
    """Whether trials finished and none of them was evaluated: no losses anywhere."""
    finished = [row for row in rows if status_of(row) == "finished"]
    return (
        bool(finished)
        and not any(is_finite(row.get(f"{split}_loss")) for row in finished for split in SPLITS)
        and not any(is_finite(row.get("forget_quality")) for row in finished)
    )


def timing_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row a method, the fastest step first; medians over its finished trials.

    Returns:
        `method`, `trials`, `steps`, `steps_s` (seconds inside steps), `train_s` (with everything between them), `step_ms`
        (milliseconds a step; null without steps), `peak_mib_per_rank` (list: the largest of each process, MiB).
    """
    table = []
    for method in dict.fromkeys(row.get("method") for row in rows):
        own = [row for row in rows if row.get("method") == method and status_of(row) == "finished"]
        if not own:
            continue
        stepped = [row for row in own if is_finite(row.get("steps")) and row["steps"] > 0 and _seconds(row)]
        per_step = [1e3 * _seconds(row) / row["steps"] for row in stepped]
        peaks = [row["peak_bytes_per_rank"] for row in own if row.get("peak_bytes_per_rank") is not None]
        n_ranks = max((len(some) for some in peaks), default=0)
        table.append({
            "method": method,
            "trials": len(own),
            "steps": _median(own, "steps"),
            "steps_s": _median(own, "steps_s"),
            "train_s": _median(own, "train_s"),
            "step_ms": statistics.median(per_step) if per_step else None,
            "peak_mib_per_rank": [max(some[rank] for some in peaks if rank < len(some)) / 2**20 for rank in range(n_ranks)],
        })  # fmt: skip
    return sorted(table, key=lambda row: (row["step_ms"] is None, row["step_ms"] or 0.0))


def timing_text(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    table = timing_rows(rows)
    width = max(len(str(row["method"])) for row in table)
    lines = [f"  {'method':<{width}} {'trials':>6} {'steps':>6} {'steps s':>9} {'train s':>9} {'ms/step':>9}  peak MiB per rank"]
    for row in table:
        numbers = " ".join(
            f"{row[name]:>9.4g}" if row[name] is not None else f"{'-':>9}" for name in ("steps_s", "train_s", "step_ms")
        )
        steps = f"{row['steps']:>6g}" if row["steps"] is not None else f"{'-':>6}"
        lines.append(f"  {row['method']!s:<{width}} {row['trials']:>6} {steps} {numbers}  {peaks_text(row)}")
    return "\n".join(lines)


def peaks_text(row: Row) -> str:
    """Peak memory of each process, MiB, separated by commas."""
    return ", ".join(f"{peak:.0f}" for peak in row["peak_mib_per_rank"]) or "-"


def _seconds(row: Row) -> float:
    """Seconds inside steps where they were taken, else of the training."""
    seconds = row.get("steps_s") if is_finite(row.get("steps_s")) else row.get("train_s")
    return float(seconds) if is_finite(seconds) else 0.0


def _median(rows: Sequence[Row], name: str) -> float | None:
    values = [float(row[name]) for row in rows if is_finite(row.get(name))]
    return statistics.median(values) if values else None
