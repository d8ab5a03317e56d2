"""The tests' own pool of processes: a failure on one rank is told, and never blocks."""

from __future__ import annotations

import os
import time

import pytest

from hamu.training.groups import Group
from tests.training.processes import Ranks, RanksFailed


def fail_on_rank_1(how: str) -> bool:
    group = Group.current("cpu")
    if group.rank == 1:
        if how == "raises":
            raise ValueError("the reason")
        if how == "dies":
            os._exit(3)
        time.sleep(60)
    return group.any(True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told"),
    [("raises", "rank 1 raised"), ("raises", "the reason"), ("dies", "rank 1 died, exit code 3"), ("hangs", "in fail_on_rank_1")],
)
def test_what_goes_wrong_on_one_rank_is_told_and_the_pool_goes_on(ranks: Ranks, how: str, told: str) -> None:
    with pytest.raises(RanksFailed) as caught:
        ranks.run(fail_on_rank_1, how, timeout_s=1.5)
    assert told in str(caught.value) and "rank 0" in str(caught.value)
    assert len(ranks.run(os.getpid, n=2)) == 2
