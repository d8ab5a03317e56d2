"""When Tune ends a trial. Small objects, one question each; combine them with `ray.tune.stopper.CombinedStopper`."""

from __future__ import annotations

from typing import Any

from ray import tune

from hamu.training.stop import StopReason


class StoppingCriterionStopper(tune.Stopper):
    """Ends a trial whose HAMU stopping criterion fired.

    The criterion needs both gradients of the step at hand, so the training loop evaluates it, leaves before that step
    is applied, and says so in `stop_reason`. A result without that key goes on.

    Its modes are settings of the trial: which rule (`stopping_rule`), after how many steps in a row (`stopping_patience`; 1: at
    once), at what margin before the rule's bound (`stopping_softness`; 0: at the bound).
    """

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Is the criterion what this result reports?"""
        return result.get("stop_reason") == StopReason.CRITERION.value

    def stop_all(self) -> bool:
        """Other trials go on."""
        return False
