"""What the driver of a sweep and its slots tell each other while trials run: an actor without a core of its own.

The driver posts notices: hold (it is about to end: save, and wait for that), and the nodes that are to be taken away. A slot has
one question with the actor at a time, which is answered when there is something new, so looking costs it no message and it never
waits. The other way go "this trial is saved" and lines for the terminal.

    notices = Notices()                     # the driver
    listener = Listener(notices.actor)      # a slot, anywhere in the cluster
    listener.heard().is_held
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_LAST_S = 2.0
_ANSWER_WITHIN_S = 60.0  # a question of a slot that has died does not stay for ever


@dataclass(frozen=True)
class Notice:
    """What the driver says. is_held: save and go no further. draining: ids of nodes that go -> when, unix seconds; 0: unknown."""

    is_held: bool = False
    draining: Mapping[str, float] = field(default_factory=dict)


class NoticeBoard:
    """Keeps the newest notice, and what the slots have said. Its methods run in one event loop."""

    def __init__(self) -> None:
        self._news = asyncio.Condition()
        self._n_posted = 0
        self._notice = Notice()
        self._saved: set[str] = set()
        self._lines: list[str] = []

    async def look(self, seen: int, within_s: float = _ANSWER_WITHIN_S) -> tuple[int, Notice]:
        """Wait for another notice than number `seen`, for `within_s` seconds at most; the newest one, and its number."""
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(within_s), self._news:
                await self._news.wait_for(lambda: self._n_posted != seen)
        return self._n_posted, self._notice

    async def post(self, notice: Notice) -> None:
        """Put a notice in the place of the last one."""
        self._notice = notice
        self._n_posted += 1
        async with self._news:
            self._news.notify_all()

    async def saved(self, trial_id: str) -> None:
        """Hear that a held trial is saved."""
        self._saved.add(trial_id)

    async def tell(self, line: str) -> None:
        """Take a line for the terminal."""
        self._lines.append(line)

    async def said(self) -> tuple[set[str], list[str]]:
        """All trials that are saved, and the lines that have come since this was asked last."""
        lines, self._lines = self._lines, []
        return set(self._saved), lines


class Notices:
    """The driver's side. Nothing here waits for an answer.

    Its actor lives on the driver's node, and goes with the driver.
    """

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(num_cpus=0)(NoticeBoard)
        self.actor: Any = actor.options(scheduling_strategy=here).remote()
        self._posted = Notice()
        self._asked: Any = None
        self._saved: set[str] = set()
        self._lines: list[str] = []

    def hold(self) -> None:
        """Have every running trial save itself and wait."""
        self._post(Notice(is_held=True, draining=self._posted.draining))

    def drain(self, nodes: Mapping[str, float]) -> None:
        """Say which nodes are to be taken away, id -> when (unix seconds)."""
        if dict(nodes) != dict(self._posted.draining):
            self._post(Notice(is_held=self._posted.is_held, draining=dict(nodes)))

    def saved(self) -> set[str]:
        """The held trials that are known to be saved by now."""
        self._hear()
        return self._saved

    def lines(self) -> list[str]:
        """Lines from the slots that are for the terminal, each given once."""
        self._hear()
        lines, self._lines = self._lines, []
        return lines

    def last_lines(self) -> list[str]:
        """What the slots have said up to now, for the end of a sweep: waits two seconds at most."""
        with contextlib.suppress(ray.exceptions.RayError):  # the actor has died, or cannot be reached
            self._lines += ray.get(self.actor.said.remote(), timeout=_LAST_S)[1]
        return self.lines()

    def _post(self, notice: Notice) -> None:
        self._posted = notice
        self.actor.post.remote(notice)

    def _hear(self) -> None:
        answer = _answer_to(self._asked)
        if answer is not None:
            saved, lines = answer
            self._saved |= saved
            self._lines += lines
        if answer is not None or _is_over(self._asked):
            self._asked = self.actor.said.remote()


class Listener:
    """A slot's side.

    Args:
        actor: of the driver's `Notices`; None: there are never any.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._asked: Any = None
        self._seen, self._notice = -1, Notice()

    def heard(self) -> Notice:
        """The newest notice that has come here; never waits."""
        if self._actor is None:
            return self._notice
        answer = _answer_to(self._asked)
        if answer is not None:
            self._seen, self._notice = answer
        if answer is not None or _is_over(self._asked):
            self._asked = self._actor.look.remote(self._seen)
        return self._notice

    def say_saved(self, trial_id: str) -> None:
        """Tell the driver that a held trial is saved."""
        if self._actor is not None:
            self._actor.saved.remote(trial_id)

    def tell(self, line: str) -> None:
        """Have the driver print a line."""
        if self._actor is not None:
            self._actor.tell.remote(line)


def _is_over(asked: Any) -> bool:
    """Whether a question has been answered, or never asked."""
    return asked is None or bool(ray.wait([asked], timeout=0, fetch_local=False)[0])


def _answer_to(asked: Any) -> Any:
    """The answer to a question; None while there is none, and where the actor cannot be reached."""
    if asked is None or not _is_over(asked):
        return None
    with contextlib.suppress(ray.exceptions.RayError):
        return ray.get(asked)
    return None
