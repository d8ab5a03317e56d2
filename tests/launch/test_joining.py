"""What a cluster is planned for: what it has, or can grow to."""

from __future__ import annotations

from typing import Any

from launch.joining import largest, machine_of
from launch.machine import choose_slots


def node(cpus: float, gpus: float = 0.0, kind: str = "") -> dict[str, Any]:
    resources = {"CPU": cpus, "GPU": gpus, "memory": 2.0**30} | ({f"accelerator_type:{kind}": 1.0} if kind else {})
    return {"Resources": resources}


def test_a_cluster_is_its_nodes_added_up() -> None:
    machine = machine_of([node(8), node(96, 8, "A100"), node(96, 8, "A100")])
    assert (machine.cpus, machine.gpus, machine.gpu_name) == (200, 16, "A100")
    assert machine.nodes == ((8, 0), (96, 8), (96, 8))
    assert machine.most_cpus == 96


def test_a_cluster_that_can_grow_is_planned_for_as_it_can_be() -> None:
    head, grown = machine_of([node(8)]), machine_of([node(8), *[node(96, 8)] * 4])
    machine = largest(head, grown)
    assert choose_slots(machine, n_trials=100, gpus=1).count == 32


def test_what_is_there_counts_where_nothing_more_is_said() -> None:
    head = machine_of([node(8), node(8)])
    assert largest(head) is head
    assert largest(head, machine_of([node(8)])) is head
