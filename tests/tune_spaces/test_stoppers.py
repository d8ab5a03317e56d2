"""The stopper ends a trial for HAMU's stopping criterion, and for nothing else."""

from __future__ import annotations

import pytest

from hamu.training.stop import StopReason
from tune_spaces.stoppers import StoppingCriterionStopper

pytestmark = pytest.mark.ray  # imports Ray


@pytest.mark.parametrize("reason", list(StopReason))
def test_only_the_criterion_stops_a_trial(reason: StopReason) -> None:
    assert StoppingCriterionStopper()("trial", {"stop_reason": str(reason)}) is (reason is StopReason.CRITERION)


def test_a_result_without_a_reason_goes_on_and_nothing_stops_all() -> None:
    assert StoppingCriterionStopper()("trial", {"step": 3}) is False
    assert StoppingCriterionStopper().stop_all() is False
