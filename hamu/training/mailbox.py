"""Which call the processes of a slot are to do next: the rules of resident workers, without Ray and without torch.

One caller asks, all ranks do, rank 0 replies. When the processes have died, the next ones begin the job again and then do the
call that was not answered, and when they die over one call again and again, it is answered with an error.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

MAX_TRIES = 3
"""How many times in a row the processes may die over one call."""


@dataclass(eq=False)
class _Call:
    method: str
    arguments: dict[str, Any]
    n_tries: int = 0
    ranks: set[int] = field(default_factory=set)  # those that have done it, in the present processes
    reply: dict[str, Any] | None = None
    is_done: bool = False


class Mailbox:
    """Calls to the ranks of one slot, who wait for them here. All its methods run in one event loop.

    A generation is one start of the processes, by any name of its own. Its script is the calls that it has to do.

    Args:
        n_ranks: processes of a generation.
    """

    def __init__(self, n_ranks: int) -> None:
        self._n_ranks = n_ranks
        self._news = asyncio.Condition()
        self._job: _Call | None = None  # the last `begin`
        self._pending: _Call | None = None
        self._generation = ""
        self._past: set[str] = set()
        self._script: dict[int, _Call] = {}
        self._n_scripted = 0
        self._has_begun = False
        self._last_error = "a worker process died (killed, or out of memory)"
        self._end = ""  # why no call can be done any more
        self._is_closing = self._has_ended = False

    async def ask(self, method: str, arguments: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Have a call done by all ranks: the reply and the error, one of them empty."""
        call = _Call(method, arguments)
        self._pending = call
        if method == "begin":
            self._job = call
        if self._generation:
            self._add_pending()
        await self._tell()
        async with self._news:
            await self._news.wait_for(lambda: call.is_done or bool(self._end))
        if self._pending is call:
            self._pending = None
        return (call.reply or {}, "") if call.is_done else ({}, self._end)

    async def arrive(self, generation: str) -> None:
        """Hear that processes have started; should they die before they do anything, that counts as a try."""
        if generation not in (self._generation, *self._past):
            self._open(generation)
        await self._tell()

    async def turn(self, generation: str, rank: int, n_done: int, reply: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
        """Take a rank's reply to the last call it has done, if any, and give it the next; None: it is to leave."""
        if generation not in (self._generation, *self._past):
            self._open(generation)
        if generation == self._generation and (last := self._script.get(n_done - 1)):
            last.ranks.add(rank)
            if rank == 0:
                last.reply = reply
            if len(last.ranks) == self._n_ranks:
                del self._script[n_done - 1]
                last.is_done = True
        await self._tell()
        async with self._news:
            await self._news.wait_for(lambda: self._is_left(generation) or n_done in self._script)
        if self._is_left(generation):
            return None
        return self._script[n_done].method, self._script[n_done].arguments

    async def fail(self, generation: str, rank: int, text: str) -> bool:
        """Take a rank's last words, and say whether it is the first of its generation; others often only miss that one."""
        if generation not in (self._generation, *self._past):
            self._open(generation)
        if generation != self._generation:
            return False
        self._last_error = f"rank {rank}: {text}"
        self._past.add(generation)
        self._generation = ""
        self._give_up_if_hopeless()
        await self._tell()
        return True

    async def close(self) -> bool:
        """Let the ranks leave, and wait until the run has ended."""
        self._is_closing = True
        await self._tell()
        async with self._news:
            await self._news.wait_for(lambda: self._has_ended)
        return True

    async def ended(self, why: str) -> None:
        """Hear that no processes will be started any more."""
        self._has_ended = True
        self._end = self._end or f"the workers have ended: {why}"
        await self._tell()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    def _open(self, generation: str) -> None:
        self._give_up_if_hopeless()
        self._past.add(self._generation)
        self._generation, self._script, self._n_scripted, self._has_begun = generation, {}, 0, False
        self._add_pending()

    def _add_pending(self) -> None:
        """Put the call that waits on the script, after its job's `begin` where these processes have not begun it.

        Not before there is such a call: a job that has ended is not to be begun again.
        """
        if self._pending is None:
            return
        begin = [self._job] if self._job and not self._has_begun else []
        for call in dict.fromkeys((*begin, self._pending)):  # one, if the call is the job's `begin`
            call.ranks.clear()
            call.n_tries += 1
            self._script[self._n_scripted] = call
            self._n_scripted += 1
            self._has_begun |= call is self._job

    def _give_up_if_hopeless(self) -> None:
        if (call := self._pending) and call.n_tries >= MAX_TRIES:
            self._end = f"the workers died {call.n_tries} times over {call.method!r}; last: {self._last_error}"

    def _is_left(self, generation: str) -> bool:
        return self._is_closing or bool(self._end) or generation != self._generation
