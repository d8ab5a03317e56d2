"""Plays a search against a table of known results: the proposals of a sweep without its training."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

from hamu.reports.views import View
from tune_spaces.search import SearchSettings, make_search


def play(
    settings: SearchSettings,
    pool: Mapping[str, Mapping[str, Any]],
    rows: Mapping[str, Mapping[str, Any]],
    *,
    view: View,
    n_slots: int = 2,
) -> tuple[list[str], str | None]:
    """Run a search: `n_slots` trials at a time, each ends after its recorded `train_s`.

    Returns:
        The trials in the order in which they ended, and the words of the search.
    """
    search = make_search(settings, pool, view=view)
    clock, begun = 0.0, 0
    running: list[tuple[float, int, str]] = []  # by end; of equals, by start
    ended: list[str] = []
    while True:
        while len(running) < n_slots and (trial_id := search.propose()) is not None:
            heapq.heappush(running, (clock + (rows[trial_id].get("train_s") or 0.0), begun, trial_id))
            begun += 1
        if not running:
            return ended, search.ended
        clock, _, trial_id = heapq.heappop(running)
        search.tell(trial_id, rows[trial_id])
        ended.append(trial_id)
