"""Which lines a sweep says of its cluster's nodes, when, and of those who wait for them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import pytest

from hamu.training.ray_workers import pending_groups
from launch.interfaces import interface_of
from launch.machine import Slots
from launch.nodes import gone_nodes, read_nodes, trial_wants
from launch.waiting import SAID_AFTER_S, SAID_EVERY_S, NodeState, Waiting, Want, changes

HEAD = NodeState(node_id="a", address="10.0.0.1", is_alive=True, cpus=1)
WORKER = NodeState(node_id="b", address="10.0.0.2", is_alive=True, cpus=1)
LOST = replace(WORKER, is_alive=False)
PAIR = Want(who="trial x", count=2, cpus=1, what="2 workers")


@dataclass
class Tune:
    """What Tune tells of a trial."""

    name: str
    status: str

    def __str__(self) -> str:
        return self.name


def said(waiting: Waiting, seconds: range, wants: list[Want], nodes: list[NodeState]) -> list[tuple[int, str]]:
    return [(second, line) for second in seconds for line in waiting.update(wants, nodes, float(second))]


def test_who_waits_after_a_loss_is_said_once_a_minute_and_once_when_it_goes_on() -> None:
    waiting = Waiting()
    assert said(waiting, range(0, 10, 3), [], [HEAD, WORKER]) == []
    lines = said(waiting, range(12, 132, 3), [PAIR], [HEAD, LOST])
    assert [second for second, _ in lines] == [18, 78]
    assert lines[0][1] == (
        "trial x waits for 2 workers of 1 core each; the cluster has 1 of 2 cores left since node 10.0.0.2 was lost; "
        "it goes on when a node joins"
    )
    again = replace(WORKER, node_id="c", address="10.0.0.3")
    assert [line for _, line in said(waiting, range(132, 160, 3), [], [HEAD, LOST, again])] == ["trial x goes on"]


def test_a_wait_that_is_short_is_not_said_and_a_gap_of_seconds_is_no_end() -> None:
    waiting = Waiting()
    both = [HEAD, WORKER]
    assert said(waiting, range(0, int(SAID_AFTER_S), 3), [PAIR], both) == []
    assert said(waiting, range(15, 24, 3), [], both) == []  # Ray Train asks anew
    assert len(said(waiting, range(24, 24 + int(SAID_EVERY_S), 3), [PAIR], both)) == 1


def test_cores_that_others_have_are_waited_for_without_a_new_node() -> None:
    lines = said(Waiting(), range(0, 30, 3), [PAIR], [HEAD, WORKER])
    assert lines[0][1].endswith("the cluster has 2 cores, and none free for it; it goes on when they are free, or a node joins")


def test_many_that_wait_are_said_in_one_line() -> None:
    wants = [Want(who=f"trial {i}", count=1, cpus=4, gpus=1) for i in range(9)]
    [(_, line)] = said(Waiting(), range(0, 30, 3), wants, [HEAD])
    assert line.startswith("trial 0 and 8 more wait for 1 GPU and 4 cores; the cluster has 0 GPUs")


def test_what_becomes_of_nodes_is_said_once() -> None:
    assert changes(None, [HEAD, WORKER]) == []
    assert changes([HEAD, WORKER], [HEAD, LOST]) == ["node 10.0.0.2 was lost; 1 node with 1 core left"]
    assert changes([HEAD, LOST], [HEAD, LOST]) == []
    new = NodeState(node_id="c", address="10.0.0.3", is_alive=True, cpus=3)
    assert changes([HEAD, LOST], [HEAD, LOST, new]) == ["node 10.0.0.3 has joined; now 2 nodes with 4 cores"]
    leaving = replace(WORKER, goes_at=time.time() + 30)
    [line] = changes([HEAD, WORKER], [HEAD, leaving])
    assert line.startswith("node 10.0.0.2 is to be taken away in ") and line.endswith("its trials are saved and go on elsewhere")
    assert changes([HEAD, leaving], [HEAD, leaving]) == []
    [line] = changes([HEAD, leaving], [HEAD, replace(leaving, is_alive=False)])
    assert line == "node 10.0.0.2 has gone, as was announced; 1 node with 1 core left"
    assert len(changes(None, [HEAD, leaving])) == 1  # announced before anybody looked


@pytest.mark.parametrize(
    ("want", "fits"),
    [
        (PAIR, True),
        (Want(who="", count=1, cpus=2), False),  # the two cores are of two nodes
        (Want(who="", count=3, cpus=0.5), True),
        (Want(who="", count=1, cpus=1, gpus=1), False),
    ],
)
def test_a_want_fits_on_nodes_that_stay(want: Want, fits: bool) -> None:
    assert want.fits([HEAD, WORKER]) is fits
    assert not want.fits([LOST, replace(HEAD, goes_at=0.0)])


def test_the_trials_that_wait_are_those_that_said_nothing_for_longest_or_have_no_process() -> None:
    trials = [Tune("old", "RUNNING"), Tune("new", "RUNNING"), Tune("next", "PENDING")]
    split = Slots(count=2, workers_per_trial=2, cpus_per_trial=2)
    group = [{"CPU": 0.99}, {"CPU": 0.99}]
    wants = trial_wants([group, [{"CPU": 0.001}]], trials, split, n_workers=2)
    assert [(want.who, want.text()) for want in wants] == [("trial old", "2 workers of 1 core each")]
    alone = Slots(count=3)
    assert [want.who for want in trial_wants([[{"CPU": 1.0}]], trials, alone, n_workers=1)] == ["trial next"]
    assert trial_wants([[{"CPU": 1.0}]], trials, Slots(count=2), n_workers=1) == []  # it waits for its turn


def test_the_interface_of_an_address_is_found() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None  # of no machine


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(60)
def test_ray_tells_of_its_nodes_and_of_what_has_no_place(ray_cluster: Any) -> None:
    [node] = read_nodes()
    assert (node.is_usable, node.cpus, node.gpus) == (True, 2.0, 0.0)
    assert gone_nodes() == set()
    placed = ray_cluster.util.placement_group([{"CPU": 0.5}])
    waiting = ray_cluster.util.placement_group([{"CPU": 2}, {"CPU": 2}])
    try:
        assert placed.wait(20)
        deadline = time.monotonic() + 20
        while not pending_groups() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [[bundle["CPU"] for bundle in group] for group in pending_groups()] == [[2.0, 2.0]]
    finally:
        for group in (placed, waiting):
            ray_cluster.util.remove_placement_group(group)
