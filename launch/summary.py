"""The end of a sweep: its summary, figure and report, and what the terminal says."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hamu.reports.cost import cost_of, cost_text, wall_seconds
from hamu.reports.page import write_results
from hamu.reports.summary import not_compared_text, summarise
from hamu.reports.tables import front_text
from hamu.storage.mount import shown
from hamu.training.records import SPLITS
from launch.machine import Machine, Slots
from launch.plan import Plan, trial_columns
from launch.results import SweepFolder, write_json
from launch.runs import all_runs
from launch.standing import resume_command

_COLUMN_OF = {"unlearning_method": "method", "hard_probability": "rho"}
"""Columns of rows that go by another name than the flag."""


def write_summary(plan: Plan, folder: SweepFolder, *, slots: Slots, machine: Machine) -> dict[str, Any]:
    """Write trials.parquet, summary.json, pareto.png and report.html from the trials' rows, and return the summary.

    It is that of `summarise`, with `search` (its settings and what search.json says), `references_failed` (why, by key),
    `resume` (the command that goes on), `settings` (that differ between the plan's trials, as columns or flags), `models` (losses
    and accuracies of the original and the retrained model, where all trials share them), `warm_start_s` and `versions`.
    """
    rows = folder.write_trials()
    runs = all_runs(folder.path)
    cost = cost_of(
        rows, n_slots=slots.count, cpus_per_trial=slots.cpus_per_trial, gpus_per_trial=slots.gpus_per_trial,
        wall_s=wall_seconds(rows, runs),
    )  # fmt: skip
    summary = summarise(
        rows,
        name=plan.name,
        space=plan.space,
        task=plan.task,
        slots=slots.count,
        hardware=machine.to_json(),
        cost=cost,
        runs=runs,
    )
    state = folder.search_state()
    search = {"n_pool": len(plan.trials), **{name: state.get(name) for name in ("ended", "view", "left_out")}}
    summary |= {"search": dataclasses.asdict(plan.search) | search}
    known = folder.references()
    summary |= {
        "references_failed": {key: known[key]["error"] for key in plan.references if "error" in known.get(key, {})},
        "resume": resume_command(plan),
    }
    summary |= {"settings": [_COLUMN_OF.get(name, name) for name in trial_columns(plan)], "models": _models(rows, known)}
    summary |= {"warm_start_s": warm_starts(list(folder.rows().values())), "versions": dict(plan.versions)}
    write_json(folder.summary, summary)
    write_results(folder.path, summary=summary)
    return summary


def _models(rows: Sequence[Mapping[str, Any]], references: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Metrics of the models that the trials lie between: of the original, and of the retrained one."""
    names = [f"{split}_{metric}" for split in SPLITS for metric in ("accuracy", "loss")]
    originals = [[row.get(f"original_{name}") for name in names] for row in rows if row.get("original_forget_loss") is not None]
    found = {}
    if originals and all(each == originals[0] for each in originals):
        found["original"] = dict(zip(names, originals[0], strict=True))
    results = [entry["result"] for entry in references.values() if entry.get("result")]
    if len(results) == 1:
        found["retrained"] = {name: results[0].get(name) for name in names}
    return found


def warm_starts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds from a trial's end to the first step of the next one in the same process: `n`, `median` and `max`."""
    by_slot: dict[Any, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row.get("started_at") or 0.0):
        if row.get("slot") is not None:
            by_slot.setdefault(row["slot"], []).append(row)
    waits = [
        after["started_at"] + after["setup_s"] - before["ended_at"]
        for slot in by_slot.values()
        for before, after in zip(slot, slot[1:], strict=False)
    ]
    return {"n": len(waits), "median": statistics.median(waits) if waits else None, "max": max(waits, default=None)}


def _model_line(name: str, metrics: Mapping[str, Any]) -> str:
    """A model's accuracies in a line."""
    known = {split: value for split in SPLITS if (value := metrics.get(f"{split}_accuracy")) is not None}
    return f"  {name} model: " + ", ".join(f"{split} {100 * value:.1f} %" for split, value in known.items())


def summary_text(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], report: Path) -> str:
    """What the terminal shows at the end: the front, what the hardness allowed, the times, the path."""
    trials, dropped = summary["trials"], summary["dropped"]
    lines = (
        []
        if summary["timing"]
        else [f"Pareto front: {len(summary['pareto'])} of {trials['total']} trials (* the setting to use)"]
    )
    if summary["hypervolume"] is not None:
        lines.append(f"hypervolume {summary['hypervolume']:.4g} in the {summary['view']} view")
    lines += [
        front_text(rows, names=summary["settings"]),
        *(_model_line(name, metrics) for name, metrics in summary["models"].items()),
        "",
        f"{trials['finished']} finished ({trials['early_stopped']} of them early), "
        + (f"{trials['pruned']} pruned, " if trials["pruned"] else "")
        + (f"{dropped} dropped as infeasible, " if dropped else "")
        + f"{trials['failed']} failed; "
        f"{summary['infeasible']} stopped infeasible, {summary['infeasible_at_start']} of them without a step",
    ]
    search = summary["search"]
    if search["ended"] is not None:
        lines.append(f"search: {search['ended']}")
    if search["left_out"]:
        lines.append(
            f"search: {search['left_out']} trials were left out, as their original failed; go on with: {summary['resume']}"
        )
    if search["view"] not in (None, summary["view"]):
        lines.append(f"the search went by the {search['view']} view")
    if words := not_compared_text(summary):
        lines.append(words)
    if summary["gradient_product"] is not None:
        lines.append(
            f"S {summary['gradient_product']:.3g}, largest feasible constraint ratio {summary['max_constraint_ratio']:.3g} "
            "(medians at the first step)"
        )
    lines.append(cost_text(summary["cost"]))
    lines += [f"failed: {row['trial_id']}: {row['error']}" for row in rows if row["status"] == "failed"]
    lines += [f"failed: the retain-only model {key}: {error}" for key, error in summary["references_failed"].items()]
    if summary["references_failed"]:
        lines.append(f"the trials of a failed retain-only model are not compared; make it with: {summary['resume']}")
    return "\n".join([*lines, f"report: {shown(report)}"])
