"""What a sweep cost: trials an hour, hours of cores or GPUs, and what ending trials early has saved. Reads trials' rows only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hamu.reports.rows import Row, is_finite

RAN = ("finished", "pruned", "failed")
"""Statuses of trials that a slot has begun; a dropped one was never run."""

EARLY = {
    "stopping_criterion": "the stopping criterion", "infeasible": "an infeasible constraint", "pruned": "the scheduler",
    "target_reached": "a target or threshold",
}  # fmt: skip
"""Stop reasons of trials that ended before their last step and were meant to, in words."""


def cost_of(
    rows: Sequence[Row],
    *,
    n_slots: int,
    cpus_per_trial: int = 1,
    gpus_per_trial: float = 0.0,
    wall_s: float | None = None,
) -> dict[str, Any]:
    """Add up what the trials of a sweep have cost.

    Args:
        rows: of trials, in the columns of TRIAL_SCHEMA; those without a start never ran (dropped, or without an original).
        n_slots: trials at once.
        cpus_per_trial, gpus_per_trial: what a slot holds; a share of a GPU counts as that share of an hour.
        wall_s: seconds that trials were run for; default: `wall_seconds` of the rows alone, which in a resumed sweep spans the
            time between.

    Returns:
        n_trials: that ran. wall_s. trials_per_hour: None where no time passed. busy_s: of trials, seconds from start to end, over
        all slots. unit: "GPU" or "core"; unit_hours: hours of it while its slot had a trial. n_slots. n_dropped. n_early: trials
        that ended before their last step by a criterion, a target or a scheduler. early_by: those by stop reason.
        steps_saved, saved_s: what they left undone, in steps and in seconds of steps at their own pace, or where they took no
        step at the median pace of their method's trials; trials of unknown pace are in `n_unknown`. saved_share: saved_s over
        what the steps of all trials would have taken; None where nothing is known.
    """
    ran = [row for row in rows if row.get("status") in RAN and row.get("started_at") is not None]
    spans = [
        (float(row["started_at"]), float(row["ended_at"]))
        for row in ran
        if row.get("started_at") is not None and row.get("ended_at") is not None
    ]
    if wall_s is None:
        wall_s = wall_seconds(ran) or 0.0
    busy_s = sum(max(0.0, end - start) for start, end in spans)
    n_units = gpus_per_trial or cpus_per_trial
    return {
        "n_trials": len(ran),
        "n_dropped": sum(row.get("status") == "dropped" for row in rows),
        "n_slots": n_slots,
        "wall_s": wall_s,
        "busy_s": busy_s,
        "trials_per_hour": 3600 * len(ran) / wall_s if wall_s > 0 else None,
        "unit": "GPU" if gpus_per_trial else "core",
        "unit_hours": busy_s * n_units / 3600,
        **_saved(ran),
    }


def wall_seconds(rows: Sequence[Row], runs: Sequence[Mapping[str, float]] = ()) -> float | None:
    """Seconds in which trials of a sweep ran, the pauses between its runs left out; None where none did.

    Args:
        rows: of trials.
        runs: `started_at` and `ended_at` of each run of the sweep, unix seconds; where they overlap, as those of shares of a
            sweep on several nodes do, that time counts once. Trials that ended before the first of them, in a sweep whose runs
            were not kept then, count from the first start to the last end.
    """
    kept_from = min((run["started_at"] for run in runs), default=math.inf)
    times = [(row.get("started_at"), row.get("ended_at")) for row in rows]
    before = [(start, end) for start, end in times if is_finite(start) and is_finite(end) and end < kept_from]
    spans = [(run["started_at"], run["ended_at"]) for run in runs]
    if before:
        spans.append((min(start for start, _ in before), max(end for _, end in before)))
    if not spans:
        return None
    seconds, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        seconds += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return seconds


def cost_text(cost: Mapping[str, Any]) -> str:
    """One or two lines: the pace and the hours; then, where trials ended early, what that saved."""
    n = cost["n_trials"]
    if not n:
        return "cost: no trial ran"
    pace = f", {cost['trials_per_hour']:.0f} an hour" if cost["trials_per_hour"] else ""
    slots = f"{cost['n_slots']} at once" if cost["n_slots"] > 1 else "one at a time"
    lines = [f"cost: {n} trials in {_seconds(cost['wall_s'])}{pace} ({slots}), {cost['unit_hours']:.3g} {cost['unit']}-hours"]
    if cost["n_early"]:
        by = ", ".join(f"{count} by {EARLY[reason]}" for reason, count in cost["early_by"].items())
        share = f" ({cost['saved_share']:.0%} of all steps' time)" if cost["saved_share"] is not None else ""
        unknown = f"; of {cost['n_unknown']} the pace is not known" if cost["n_unknown"] else ""
        lines.append(f"early stopping saved {_seconds(cost['saved_s'])} of training{share}: {by}{unknown}")
    return "\n".join(lines)


def _saved(ran: Sequence[Row]) -> dict[str, Any]:
    """What trials that ended early left undone."""
    paces: dict[str, list[float]] = {}
    for row in ran:
        if (pace := _pace(row)) is not None:
            paces.setdefault(str(row.get("method")), []).append(pace)
    early_by: dict[str, int] = {}
    saved_s, spent_s, n_steps, n_unknown = 0.0, 0.0, 0, 0
    for row in ran:
        spent_s += float(row.get("steps_s") or 0.0)
        left = int(row.get("total_steps") or 0) - int(row.get("steps") or 0)
        reason = str(row.get("stop_reason"))
        if reason not in EARLY or left <= 0:
            continue
        early_by[reason] = early_by.get(reason, 0) + 1
        n_steps += left
        own = _pace(row)
        known = paces.get(str(row.get("method")), [])
        if own is None and not known:
            n_unknown += 1
        else:
            saved_s += left * (own if own is not None else statistics.median(known))
    whole_s = spent_s + saved_s
    return {
        "n_early": sum(early_by.values()),
        "early_by": early_by,
        "steps_saved": n_steps,
        "saved_s": saved_s,
        "saved_share": saved_s / whole_s if whole_s > 0 else None,
        "n_unknown": n_unknown,
    }


def _pace(row: Row) -> float | None:
    """Seconds a step of a trial; None where it took none, or was not timed."""
    steps, seconds = int(row.get("steps") or 0), row.get("steps_s")
    return float(seconds) / steps if steps > 0 and seconds is not None else None


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
