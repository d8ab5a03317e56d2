"""The two views of a sweep: which column counts as forgetting, beside retained utility.

paper      forget_quality (rise of the forget loss, nats) against retain_utility (minus the rise of the retain loss, nats)
reference  forget_closeness (1: like the retrained model, 0: as far from it as the original) against retain_utility

The paper view rewards over-forgetting, so a sweep with retrained models for all its trials is read in the reference view.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hamu.errors import ConfigError, unknown
from hamu.reports.rows import Row, classes_of, is_finite, status_of

_CLOSENESS = "forget_closeness"
VIEWS = {"paper": ("forget_quality", "retain_utility"), "reference": (_CLOSENESS, "retain_utility")}


@dataclass(frozen=True)
class View:
    """A pair of axes, both better when larger.

    Args:
        name: "paper" or "reference".

    Raises:
        ConfigError: another name.
    """

    name: str = "paper"

    def __post_init__(self) -> None:
        if self.name not in VIEWS:
            raise ConfigError(unknown("view", self.name, VIEWS))

    @property
    def axes(self) -> tuple[str, str]:
        """The columns of forgetting and of utility."""
        return VIEWS[self.name]

    def forgetting(self, row: Row) -> float | None:
        """How much a trial forgot: the paper view's counts up to `enough`, twice the loss of a guess; None: not measured."""
        value = row.get(self.axes[0])
        if not is_finite(value):
            return None
        return min(value, enough(classes_of((row,)))) if self.name == "paper" else value

    def point(self, row: Row) -> tuple[float, float] | None:
        """A trial's place, (forgetting, utility), as searches and the hypervolume see it.

        Returns:
            None for a trial that has not finished (failed, pruned, dropped) or whose axes are not both finite.
        """
        forgetting, utility = self.forgetting(row), row.get(self.axes[1])
        if status_of(row) != "finished" or forgetting is None or not is_finite(utility):
            return None
        return forgetting, float(utility)

    def reference_point(self, rows: Iterable[Row]) -> tuple[float, float] | None:
        """The corner that the hypervolume is measured from: nothing forgotten, and the retain loss risen by that of a guess.

        Returns:
            (0, -ln(classes)); classes are the vocabulary for texts. None: no row states their number.
        """
        n_classes = classes_of(rows)
        return None if n_classes is None else (0.0, -math.log(n_classes))


def enough(n_classes: int | None) -> float:
    """Rise of the forget loss from which on more is not better, nats: twice the loss of a guess; infinite when unknown."""
    return math.inf if n_classes is None else 2.0 * math.log(n_classes)


def view_of(rows: Iterable[Row], *, to_come: Iterable[bool] = ()) -> View:
    """The reference view where each trial that can be compared with a retrained model was, else the paper view.

    In a view that only some trials have a place in, the others would be lost without a word.

    Args:
        rows: of trials that ended; those without a finite place in either view (failed, pruned, diverged) decide nothing.
        to_come: of each trial that has still to run, whether its retrained model is there to compare it with.
    """
    compared = [is_finite(row.get(_CLOSENESS)) for row in rows if _has_place(row)] + list(to_come)
    return View("reference" if compared and all(compared) else "paper")


def not_compared(rows: Iterable[Row]) -> list[str]:
    """Ids of the trials that lack the comparison with a retrained model that others have; why `view_of` is the paper view."""
    placed = [row for row in rows if _has_place(row)]
    lacking = [str(row.get("trial_id")) for row in placed if not is_finite(row.get(_CLOSENESS))]
    return lacking if len(lacking) < len(placed) else []


def _has_place(row: Row) -> bool:
    return status_of(row) == "finished" and any(all(is_finite(row.get(axis)) for axis in axes) for axes in VIEWS.values())
