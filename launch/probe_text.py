"""What a probe has found, for people and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from launch.probe import Probe, ProbedGroup, ProbedTrial

N_BLOCKS = 8
"""Blocks with a line of their own; the others are summed."""

_NAME = 40


def probe_text(probe: Probe) -> str:
    """Lines for a terminal; see `_READING` for what their columns mean."""
    if not probe.groups and not probe.failed:
        return "nothing to measure: no trial has a constraint"
    n_trials = sum(len(group.trials) for group in probe.groups)
    lines = [f"first gradients of {n_trials} trials with a constraint, measured in {probe.seconds:.1f} s:"]
    for group in probe.groups:
        lines += ["", *_group_lines(group)]
    lines += [f"  the pairs of {trial} and what shares them could not be measured: {why}" for trial, why in probe.failed.items()]
    if probe.groups:
        lines += ["", _READING]
    if probe.dropped:
        lines.append(f"{len(probe.dropped)} of the trials would end at their first step:")
        trials = {trial_id: trial for group in probe.groups for trial_id, trial in group.trials.items()}
        lines += [f"  {trial_id}: {_allowed(trials[trial_id])}" for trial_id in probe.dropped]
    return "\n".join(lines)


_READING = (
    "a step with a constraint ratio above the feasible bound hurts the other loss; the published rule's bound is lower where "
    "kappa <= 0.\nS: sum over blocks of |g_r| |g_f|; a ratio that is a share of S (relative_constraint) compares with what is in "
    "brackets."
)


def group_json(group: ProbedGroup) -> dict[str, Any]:
    """A group for probe.json: angles in degrees, a list entry a pair, of a block a list of those."""
    pairs = group.pairs
    return {
        "original": group.original,
        "forget_set": group.forget_set,
        "seed": group.config.run.seed,
        "rows_per_step": group.config.rows_per_step,
        "full_grad": group.config.method.full_grad,
        "gradient_product": pairs.product.tolist(),
        "kappa": pairs.whole_kappa.tolist(),
        "angle": np.degrees(pairs.whole_angle).tolist(),
        "feasible_bound": pairs.feasible_bound.tolist(),
        "aggregate_bound": pairs.aggregate_bound.tolist(),
        "blocks": {
            name: {
                "retain_norm": pairs.retain_norm[:, index].tolist(),
                "forget_norm": pairs.forget_norm[:, index].tolist(),
                "kappa": pairs.kappa[:, index].tolist(),
                "angle": np.degrees(pairs.angle[:, index]).tolist(),
            }
            for index, name in enumerate(pairs.blocks)
        },
        "trials": {
            trial_id: {
                "constraint_ratio": trial.config.constraint_ratio,
                "asked": trial.asked,
                "largest": list(trial.largest),
                "is_stopped": list(trial.is_stopped),
            }
            for trial_id, trial in group.trials.items()
        },
    }


def _group_lines(group: ProbedGroup) -> list[str]:
    pairs, config = group.pairs, group.config
    methods = sorted({trial.config.method_name for trial in group.trials.values()})
    ratios = sorted({trial.config.constraint_ratio or 0.0 for trial in group.trials.values()})
    is_relative = any(trial.config.method.relative_constraint for trial in group.trials.values())
    asked = f"{ratios[0]:g}" if len(ratios) == 1 else f"{ratios[0]:g} to {ratios[-1]:g}"
    asked += " of S" * is_relative
    lines = [
        f"{group.forget_set}, seed {config.run.seed}, {config.rows_per_step} rows of each a step, original {group.original}"
        f"{', the whole model as one block' if config.method.full_grad else ''}",
        f"  {len(group.trials)} trials of {', '.join(methods)}, constraint ratios asked for: {asked}",
        "   pair          S      kappa   angle   feasible bound    published bound",
    ]
    for index in range(len(pairs)):
        product = pairs.product[index]
        bounds = "".join(
            f"  {bound:8.4g} {f'({_share(bound, product)} S)':>9}"
            for bound in (pairs.feasible_bound[index], pairs.aggregate_bound[index])
        )
        name = f"{index + 1}{' first step' * (index == 0)}"
        angle = np.degrees(pairs.whole_angle[index])
        lines.append(f"   {name:<12}{product:9.4g}{pairs.whole_kappa[index]:11.3g}{angle:7.1f}{bounds}")
    return lines + _block_lines(group)


def _allowed(trial: ProbedTrial) -> str:
    bounds = ", ".join(f"{bound:.4g}" for bound in trial.largest)
    if trial.asked > max(trial.largest):
        return f"{trial.asked:.4g} asked for, allowed {bounds}"
    return f"{trial.asked:.4g} asked for, stopped by the rule {trial.config.method.stopping_rule}"


def _block_lines(group: ProbedGroup) -> list[str]:
    """A line for each of the blocks that hold most of S, and one for the others: minimum, median and maximum over the pairs."""
    pairs = group.pairs
    products = pairs.retain_norm * pairs.forget_norm
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.nan_to_num(products / products.sum(axis=1, keepdims=True))
    order = np.argsort(-np.median(shares, axis=0), kind="stable")
    names = {index: _shortened(pairs.blocks[index]) for index in order[:N_BLOCKS]}
    width = max(12, *map(len, names.values()))
    ends = "min median max"
    header = f"   {'block':<{width}}   share of S   {'kappa: ' + ends:>26}   {'angle: ' + ends:>23}"
    lines = [header if group.config.method.full_grad else f"{header}   {'bound: ' + ends:>26}"]
    for index, name in names.items():
        lines.append(_block_line(group, name, np.array([index]), shares, width))
    if len(rest := order[N_BLOCKS:]):
        lines.append(_block_line(group, f"{len(rest)} others", rest, shares, width))
    return lines


def _block_line(group: ProbedGroup, name: str, blocks: np.ndarray, shares: np.ndarray, width: int) -> str:
    pairs = group.pairs
    share = 100 * np.median(shares[:, blocks].sum(axis=1))
    kappa = pairs.kappa[:, blocks].sum(axis=1)
    columns = [_ends(kappa, ".3g", 8), _ends(np.degrees(pairs.angle_of(blocks)), ".1f", 7)]
    if not group.config.method.full_grad:  # else the bound is not a sum over blocks
        columns.append(_ends(pairs.block_bounds[:, blocks].sum(axis=1), ".3g", 8))
    return f"   {name:<{width}}   {share:9.1f}%   {'   '.join(columns)}"


def _ends(values: np.ndarray, form: str, width: int) -> str:
    return " ".join(f"{value:{width}{form}}" for value in (np.min(values), np.median(values), np.max(values)))


def _shortened(name: str) -> str:
    """The end of a long name, which tells blocks apart."""
    return name if len(name) <= _NAME else f"...{name[3 - _NAME :]}"


def _share(bound: float, product: float) -> str:
    return f"{bound / product:.2f}" if product > 0 else "-"
