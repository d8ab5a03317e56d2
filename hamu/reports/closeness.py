"""How much of the way from the original to the retrained model a trial went on the forget rows: the reference view."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hamu.reports.rows import Row, is_finite
from hamu.training.records import METRIC_COLUMNS

NEGLIGIBLE_GAP = 0.01
"""Gap between original and retrained model under which a part is left out: a hundredth of a nat, of the accuracy, of the AUC.

Another seed of the retrained model moves these by as much, so a share of a smaller gap would be noise.
"""

_PARTS = ("forget_loss", "forget_accuracy", "forget_test_loss_auc")
# The retrained model's own two are from the weights that it was trained from; a trial's are from the original model.
_FROM_THE_ORIGINAL = {"forget_quality": ("forget_loss", 1.0), "retain_utility": ("retain_loss", -1.0)}


def forget_closeness(row: Row) -> float | None:
    """Mean over loss, accuracy and AUC on the forget rows of 1 - |value - retrained| / |original - retrained|.

    1: like the retrained model; 0: as far from it as the original; over-shoot counts as distance, so there is no lower end.
    The AUC is that of telling forget rows from test rows by their loss. It is taken as it is, not as |AUC - 0.5|: where a whole
    class is forgotten the retrained model's AUC is near 0, the original's near 1, and a trial on its way from the one to the
    other would pass 0.5, which is further from both by that measure. A part is left out where original or retrained lack it,
    or differ by less than NEGLIGIBLE_GAP; the same parts are then left out for all trials of the two models.

    Args:
        row: columns <metric>, original_<metric> and retrained_<metric>.

    Returns:
        None when no part is left, or the trial's own value of one that is left is not finite.

    Source: ours.
    """
    shares = []
    for metric in _PARTS:
        before, goal, value = (row.get(f"{kind}{metric}") for kind in ("original_", "retrained_", ""))
        if not (is_finite(before) and is_finite(goal)) or abs(before - goal) < NEGLIGIBLE_GAP:
            continue
        if not is_finite(value):
            return None
        shares.append(1.0 - abs(value - goal) / abs(before - goal))
    return sum(shares) / len(shares) if shares else None


def with_references(rows: Iterable[Row], references: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare trials with their retrained models.

    Args:
        rows: one dict a trial; `reference` is the key of its retrained model.
        references: key -> {"result": metric -> value}, or {"error": ...}.

    Returns:
        Copies of the rows with `forget_closeness`, and `retrained_<metric>` for each metric that the reference has. A row whose
        reference is not there (yet, or it failed) is returned as it was.
    """
    return [_with_reference(row, references.get(row.get("reference") or "", {}).get("result")) for row in rows]


def _with_reference(row: Row, result: Mapping[str, Any] | None) -> dict[str, Any]:
    if not result:
        return dict(row)
    names = (name for name in METRIC_COLUMNS if name not in _FROM_THE_ORIGINAL and is_finite(result.get(name)))
    known = {**row, **{f"retrained_{name}": result[name] for name in names}}
    for name, (loss, sign) in _FROM_THE_ORIGINAL.items():
        before, after = row.get(f"original_{loss}"), result.get(loss)
        if is_finite(before) and is_finite(after):
            known[f"retrained_{name}"] = sign * (after - before)
    return {**known, "forget_closeness": forget_closeness(known)}
