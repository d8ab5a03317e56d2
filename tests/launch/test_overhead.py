"""A sweep of trials that do nothing costs little a trial, keeps the driver small, and leaves a folder that is read at once."""

from __future__ import annotations

import pytest

from tests.benchmarks.bench_overhead import LIMITS, WAYS, measure_apart

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.mark.slow
def test_a_hundred_trials_that_do_nothing_end_within_seconds() -> None:
    figures = measure_apart("random", 100)
    # What a run costs once is shared by fewer trials here, and other tests may run beside this one.
    assert figures["trial_s"] < 10 * LIMITS["trial_s"], figures
    assert figures["memory_mb"] < LIMITS["memory_mb"], figures
    assert figures["rows_s"] < LIMITS["rows_s"], figures


@pytest.mark.soak
@pytest.mark.parametrize("way", WAYS)
def test_a_thousand_trials_that_do_nothing_keep_the_limits(way: str) -> None:
    figures = measure_apart(way)
    assert {name: figures[name] for name, limit in LIMITS.items() if figures[name] > limit} == {}, figures
