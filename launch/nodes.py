"""The nodes of the cluster as a sweep sees them: which were lost, came, or are to go, and which trials wait for what meanwhile.

watch = Watch(words.say, slots=slots, notices=notices)
watch.poll(trials)      # from a loop that turns; asks Ray every three seconds
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import ray

from hamu.training.ray_workers import pending_groups
from launch.machine import Slots
from launch.notices import Notices
from launch.waiting import SAID_EVERY_S, NodeState, Waiting, Want, changes, count_words

POLL_EVERY_S = 3.0


class Watch:
    """Tells the terminal what becomes of the nodes and who waits for them, and the slots which nodes are to go.

    Args:
        say: prints a line.
        slots: how many trials run at once, on what.
        n_workers: processes of a trial, each on `slots.cpus_per_worker`; 1: the trial is one process.
        notices: of the driver; brings lines of the slots, too.
        read: gives the nodes' present states; default: Ray's.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        slots: Slots,
        n_workers: int = 1,
        notices: Notices | None = None,
        read: Callable[[], list[NodeState]] | None = None,
    ) -> None:
        self._say, self._slots, self._n_workers, self._notices = say, slots, n_workers, notices
        self._read = read or read_nodes
        self._nodes: list[NodeState] | None = None
        self._waiting = Waiting()
        self._poll_after = 0.0
        self._lines: dict[str, float] = {}

    @property
    def is_due(self) -> bool:
        """Whether `poll` would look now."""
        return time.monotonic() >= self._poll_after

    def poll(self, trials: Sequence[Any] = (), wants: Iterable[Want] = ()) -> None:
        """Look at the nodes, at most every three seconds; never raises for what Ray does not answer.

        Args:
            trials: Tune's, of which some may wait for cores; those that have not reported for longest first.
            wants: of others: they wait where no node is large enough.
        """
        if not self.is_due:
            return
        now = time.monotonic()
        self._poll_after = now + POLL_EVERY_S
        if self._notices is not None:
            for line in self._notices.lines():
                if now - self._lines.get(line, -SAID_EVERY_S) >= SAID_EVERY_S:  # who waits for space says so again and again
                    self._lines[line] = now
                    self._say(line)
        try:
            nodes = self._read()
            waiting = [want for want in wants if not want.fits(nodes)]
            if trials:
                groups = pending_groups()
                waiting += trial_wants(groups, trials, self._slots, n_workers=self._n_workers)
        except (ray.exceptions.RayError, RuntimeError, OSError):
            return  # the head does not answer; Ray itself gives up after a minute
        if self._notices is not None:
            self._notices.drain({node.node_id: node.goes_at for node in nodes if node.goes_at is not None and node.is_alive})
        for line in (*changes(self._nodes, nodes), *self._waiting.update(waiting, nodes, now)):
            self._say(line)
        self._nodes = nodes


def read_nodes() -> list[NodeState]:
    """The states of all nodes that Ray knows of, dead ones too."""
    from ray._private.state import state

    draining = state.get_draining_nodes()
    return [
        NodeState(
            node_id=node["NodeID"],
            address=str(node["NodeManagerAddress"]),
            is_alive=bool(node["Alive"]),
            cpus=float(node["Resources"].get("CPU", 0.0)),
            gpus=float(node["Resources"].get("GPU", 0.0)),
            goes_at=draining[node["NodeID"]] / 1000 if node["NodeID"] in draining else None,
        )
        for node in ray.nodes()
    ]


def gone_nodes() -> Collection[str]:
    """Ids of the nodes that are dead or about to be taken away."""
    return {node.node_id for node in read_nodes() if not node.is_alive or node.goes_at is not None}


def trial_wants(
    groups: Sequence[Sequence[dict[str, float]]], trials: Sequence[Any], slots: Slots, *, n_workers: int
) -> list[Want]:
    """Which trials wait for cores, and for how many.

    Args:
        groups: the placement groups of this job that Ray has found no place for: the resources of their bundles.
        trials: Tune's.
        slots: of the sweep.
        n_workers: of a trial.
    """
    running = [str(trial) for trial in trials if trial.status == "RUNNING"]
    if n_workers > 1:  # Tune's own process of a trial takes next to nothing; its workers' cores are what may be missing
        n_waiting = sum(len(group) >= n_workers for group in groups)
        who = running
    else:
        n_waiting = min(len(groups), max(0, slots.count - len(running)))
        who = [str(trial) for trial in trials if trial.status == "PENDING"]
    cpus, gpus = float(slots.cpus_per_worker), float(slots.gpus_per_worker)
    return [
        Want(who=f"trial {trial_id}", count=n_workers, cpus=cpus, gpus=gpus, what=count_words(n_workers, "worker"))
        for trial_id in who[:n_waiting]
    ]
