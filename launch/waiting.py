"""What is said of a cluster's nodes, and of those who wait for them: which line when. Knows no Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SAID_AFTER_S = 15.0
"""How long somebody has waited for cores that others have before that is said."""

LOST_AFTER_S = 5.0
"""The same for cores that the cluster has not."""

SAID_EVERY_S = 60.0

_GAP_S = 10.0  # Ray Train asks for its cores anew every minute; in between nobody seems to wait
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class NodeState:
    """A node now. goes_at: when it will be taken away, unix seconds, 0 where that is not known; None: it stays."""

    node_id: str
    address: str
    is_alive: bool
    cpus: float
    gpus: float = 0.0
    goes_at: float | None = None

    @property
    def is_usable(self) -> bool:
        """Whether something new can start there."""
        return self.is_alive and self.goes_at is None


@dataclass(frozen=True, kw_only=True)
class Want:
    """Cores or GPUs that somebody needs: `count` times so many of each, every time on one node. what: "2 workers"."""

    who: str
    count: int
    cpus: float
    gpus: float = 0.0
    what: str = ""

    def fits(self, nodes: Iterable[NodeState]) -> bool:
        """Whether it would have a place if nothing else ran."""
        return sum(self._places(node) for node in nodes if node.is_usable) >= self.count

    def text(self) -> str:
        """For what it waits."""
        each = [count_words(self.cpus, "core")] if not self.gpus else [count_words(self.gpus, "GPU")]
        if self.gpus and self.cpus:
            each.append(count_words(self.cpus, "core"))
        return f"{self.what} of {' and '.join(each)} each" if self.count > 1 else " and ".join(each)

    def _places(self, node: NodeState) -> int:
        by = [have / need for have, need in ((node.cpus, self.cpus), (node.gpus, self.gpus)) if need]
        return math.floor(min(by) + 1e-6) if by else self.count


def changes(before: Sequence[NodeState] | None, now: Sequence[NodeState]) -> list[str]:
    """What became of the nodes since they were looked at last; nothing when that is for the first time."""
    if before is None:
        before = [node for node in now if node.goes_at is None]
    known = {node.node_id: node for node in before}
    left, lines = f"{_total_words(now)} left", []
    for node in now:
        old = known.get(node.node_id)
        was_alive = old is not None and old.is_alive
        if was_alive and not node.is_alive:
            how = "has gone, as was announced" if old is not None and old.goes_at is not None else "was lost"
            lines.append(f"node {node.address} {how}; {left}")
        elif node.is_alive and not was_alive and (old is not None or len(before) < len(now)) and node.goes_at is None:
            lines.append(f"node {node.address} has joined; now {_total_words(now)}")
        if node.is_alive and node.goes_at is not None and (old is None or old.goes_at is None):
            seconds = f" in {max(0.0, node.goes_at - time.time()):.0f} s" if node.goes_at else ""
            lines.append(f"node {node.address} is to be taken away{seconds}; its trials are saved and go on elsewhere")
    return lines


class Waiting:
    """Who has waited for how long, and what is to be said of it: first after some seconds, then every minute, then the end."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._seen: dict[str, float] = {}
        self._said: set[str] = set()
        self._say_after = 0.0
        self._most: tuple[float, float] = (0.0, 0.0)
        self._lost = ""
        self._alive: dict[str, str] = {}

    def update(self, wants: Sequence[Want], nodes: Sequence[NodeState], now: float) -> list[str]:
        """Lines to say now.

        Args:
            wants: of those who wait.
            nodes: the cluster's.
            now: of `time.monotonic`.
        """
        self._note_nodes(nodes)
        of = {want.who: want for want in wants}
        for who in of:
            self._since.setdefault(who, now)
            self._seen[who] = now
        ended = [who for who, seen in self._seen.items() if who not in of and now - seen >= _GAP_S]
        lines = []
        for who in ended:
            del self._seen[who], self._since[who]
        if gone := [who for who in ended if who in self._said]:
            self._said.difference_update(gone)
            lines.append(f"{_names(gone)} {'goes' if len(gone) == 1 else 'go'} on")
        patience = {who: SAID_AFTER_S if want.fits(nodes) else LOST_AFTER_S for who, want in of.items()}
        late = [want for who, want in of.items() if now - self._since[who] >= patience[who]]
        if late and (now >= self._say_after or not any(want.who in self._said for want in late)):
            lines.append(self._line(late, nodes))
            self._said.update(want.who for want in late)
            self._say_after = now + SAID_EVERY_S
        return lines

    def _note_nodes(self, nodes: Sequence[NodeState]) -> None:
        """Remember the most that the cluster has had, and which node was lost last."""
        alive = {node.node_id: node.address for node in nodes if node.is_alive}
        for node_id in self._alive.keys() - alive.keys():
            self._lost = self._alive[node_id]
        self._alive = alive
        total = _total(nodes)
        self._most = (max(self._most[0], total[0]), max(self._most[1], total[1]))

    def _line(self, wants: Sequence[Want], nodes: Sequence[NodeState]) -> str:
        want, have = wants[0], _total(nodes)
        i, unit = (1, "GPU") if want.gpus else (0, "core")
        waits = f"{_names([each.who for each in wants])} {'waits' if len(wants) == 1 else 'wait'} for {want.text()}"
        if have[i] < self._most[i] and self._lost:
            cluster = f"the cluster has {have[i]:g} of {count_words(self._most[i], unit)} left since node {self._lost} was lost"
        else:
            cluster = f"the cluster has {count_words(have[i], unit)}, and none free for it"
        if want.fits(nodes):
            return f"{waits}; {cluster}; it goes on when they are free, or a node joins"
        return f"{waits}; {cluster}; it goes on when a node joins"


def count_words(number: float, noun: str) -> str:
    """A number with its noun."""
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def _names(who: Sequence[str]) -> str:
    if len(who) <= _NAMED:
        return " and ".join(who) if len(who) < _NAMED else f"{', '.join(who[:-1])} and {who[-1]}"
    return f"{who[0]} and {len(who) - 1} more"


def _total(nodes: Iterable[NodeState]) -> tuple[float, float]:
    usable = [node for node in nodes if node.is_usable]
    return sum(node.cpus for node in usable), sum(node.gpus for node in usable)


def _total_words(nodes: Iterable[NodeState]) -> str:
    nodes = list(nodes)
    cpus, gpus = _total(nodes)
    n_usable = sum(node.is_usable for node in nodes)
    return f"{count_words(n_usable, 'node')} with {count_words(cpus, 'core')}" + (
        f" and {count_words(gpus, 'GPU')}" if gpus else ""
    )
