"""The hypervolume of a sweep: the area that its trials dominate, in one number that grows with a better front."""

from __future__ import annotations

from collections.abc import Sequence

from hamu.reports.rows import Row, classes_of
from hamu.reports.views import View, enough


def hypervolume(rows: Sequence[Row], view: View) -> float | None:
    """Area between the Pareto front and the view's reference point.

    In nats squared in the paper view, where forgetting counts up to twice the loss of a guess; in nats in the reference view.
    A point that is not better than the reference point on both axes adds nothing.

    Args:
        rows: one dict a trial, columns of TRIAL_SCHEMA; those that have not finished or are not finite count nothing.
        view: the axes.

    Returns:
        0 where no trial has a place in the view; None where the number of classes, and so the reference point, is not known.

    Source: the computation is moocore's.
    """
    corner = view.reference_point(rows)
    if corner is None:
        return None
    most = enough(classes_of(rows)) if view.name == "paper" else float("inf")
    points = [(min(point[0], most), point[1]) for row in rows if (point := view.point(row)) is not None]
    better = [point for point in points if point[0] > corner[0] and point[1] > corner[1]]
    if not better:
        return 0.0
    from moocore import hypervolume as area  # here, as it loads a C library that most readers of rows never need

    return float(area(better, ref=corner, maximise=True))
