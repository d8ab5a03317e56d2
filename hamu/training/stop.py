"""Why a run ended: values that are recorded and that every rank agrees on, never exceptions."""

from __future__ import annotations

from enum import StrEnum


class StopReason(StrEnum):
    """How a run ended. All but CANCELLED are ends a user may expect; every one keeps the model, the metrics and the reason.

    PRUNED is the scheduler's or the user's choice to spend no more on a trial.
    """

    FINISHED = "finished"
    CRITERION = "stopping_criterion"
    INFEASIBLE = "infeasible"
    NON_FINITE = "non_finite"
    TARGET = "target_reached"
    PRUNED = "pruned"
    CANCELLED = "cancelled"
