"""The searches against a grid of the quickstart task that was measured once (tests/benchmarks/results/search_grid.json)."""

from __future__ import annotations

import statistics

import pytest

from tests.benchmarks.bench_search import LEAST_SHARE, MOST_TRIALS, SEEDS, TARGETS, meeting, read_table, shares, trials_to_target
from tune_spaces.search import SearchSettings


def test_the_table_is_a_grid_of_sixty_finished_trials_with_a_retrained_model():
    table = read_table()
    assert len(table.pool) == len(table.rows) == 60
    assert {row["status"] for row in table.rows.values()} == {"finished"}
    assert [view.name for view in table.views] == ["paper", "reference"]


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
@pytest.mark.parametrize("view", [0, 1])
def test_24_trials_reach_nine_tenths_of_the_grids_hypervolume(name, view):
    table = read_table()
    assert statistics.median(shares(table, name, table.views[view], SEEDS)) >= LEAST_SHARE


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_that_the_grid_meets_is_met_within_half_of_its_trials(name):
    table, (target, keep) = read_table(), TARGETS[name]
    assert meeting(table, target, keep)
    assert SearchSettings(target=target, keep=keep).budget(len(table.pool)) == MOST_TRIALS
    assert max(trials_to_target(table, target, keep, "grid", SEEDS)) <= MOST_TRIALS
