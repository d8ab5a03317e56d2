"""Which call the ranks are to do next, with the ranks played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from hamu.training.mailbox import MAX_TRIES, Mailbox


class Ranks:
    """Two ranks of one generation, which take calls and reply."""

    def __init__(self, mailbox: Mailbox, generation: str) -> None:
        self.mailbox, self.generation, self.n_done, self.reply = mailbox, generation, 0, {}

    async def turn(self, rank: int) -> Any:
        return await asyncio.wait_for(self.mailbox.turn(self.generation, rank, self.n_done, self.reply), 5)

    async def take(self) -> Any:
        """What both are given; they reply to it with their next turn."""
        first, second = await asyncio.gather(self.turn(0), self.turn(1))
        assert first == second
        self.n_done += 1
        self.reply = {"by": self.generation}
        return first


def played(story: Callable[[Mailbox], Any]) -> None:
    async def play() -> None:
        tasks = asyncio.create_task(story(Mailbox(n_ranks=2)))
        await asyncio.wait_for(tasks, 10)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    asyncio.run(play())


async def asked(mailbox: Mailbox, method: str, **arguments: Any) -> asyncio.Task[Any]:
    task = asyncio.create_task(mailbox.ask(method, arguments))
    await asyncio.sleep(0)
    return task


def test_a_call_is_answered_when_all_ranks_have_done_it() -> None:
    async def story(mailbox: Mailbox) -> None:
        call = await asked(mailbox, "begin", job=1)
        assert await mailbox.turn("one", 0, 0, {}) == ("begin", {"job": 1})
        assert await mailbox.turn("one", 1, 0, {}) == ("begin", {"job": 1})
        waiting = asyncio.create_task(mailbox.turn("one", 0, 1, {"by": "rank 0"}))
        await asyncio.sleep(0.01)
        assert not call.done()
        also_waiting = asyncio.create_task(mailbox.turn("one", 1, 1, {}))
        assert await call == ({"by": "rank 0"}, "")
        assert not waiting.done() and not also_waiting.done()

    played(story)


def test_new_processes_begin_the_job_again_and_then_do_the_call_that_was_not_answered() -> None:
    async def story(mailbox: Mailbox) -> None:
        old, new = Ranks(mailbox, "old"), Ranks(mailbox, "new")
        begin = await asked(mailbox, "begin", job=1)
        await old.take()
        taking = asyncio.create_task(old.take())
        assert await begin == ({"by": "old"}, "")
        advance = await asked(mailbox, "advance")
        assert await taking == ("advance", {})
        assert await new.take() == ("begin", {"job": 1})
        assert await new.take() == ("advance", {})
        assert not advance.done()
        assert await old.turn(0) is None  # a process that lived on is of no use any more
        leaving = asyncio.create_task(new.take())
        assert await advance == ({"by": "new"}, "")
        assert await mailbox.ask("advance", {}) if leaving.done() else True

    played(story)


def test_a_job_that_has_ended_is_not_begun_again_in_processes_that_start_while_idle() -> None:
    async def story(mailbox: Mailbox) -> None:
        old, new = Ranks(mailbox, "old"), Ranks(mailbox, "new")
        begin = await asked(mailbox, "begin", job=1)
        await old.take()
        idle = asyncio.create_task(old.take())
        await begin
        taking = asyncio.create_task(new.take())
        assert await idle is None
        await asked(mailbox, "begin", job=2)
        assert await taking == ("begin", {"job": 2})

    played(story)


@pytest.mark.parametrize("is_told", [True, False])
def test_processes_that_die_over_a_call_again_and_again_are_given_up(is_told: bool) -> None:
    async def story(mailbox: Mailbox) -> None:
        call = await asked(mailbox, "begin", job=1)
        for generation in map(str, range(MAX_TRIES)):
            assert not call.done()
            assert await Ranks(mailbox, generation).take() == ("begin", {"job": 1})
            if is_told:
                await mailbox.fail(generation, 1, "OutOfMemoryError: no memory")
                await mailbox.fail(generation, 0, "RuntimeError: connection closed by peer")
        assert await Ranks(mailbox, "the last").take() is None
        reply, error = await call
        assert not reply
        assert ("rank 1: OutOfMemoryError: no memory" if is_told else "a worker process died") in error
        assert f"died {MAX_TRIES} times over 'begin'" in error

    played(story)


def test_what_cannot_be_built_counts_as_a_death() -> None:
    async def story(mailbox: Mailbox) -> None:
        call = await asked(mailbox, "begin", job=1)
        for generation in map(str, range(MAX_TRIES)):
            await mailbox.fail(generation, 0, "ModuleNotFoundError: nothing there")
        assert "ModuleNotFoundError: nothing there" in (await call)[1]

    played(story)


def test_processes_that_die_before_they_ask_for_a_call_count_too() -> None:
    async def story(mailbox: Mailbox) -> None:
        call = await asked(mailbox, "begin", job=1)
        for generation in map(str, range(MAX_TRIES)):
            await mailbox.arrive(generation)
            await mailbox.arrive(generation)  # each rank says it
            assert not call.done()
        await mailbox.arrive("the last")
        assert f"died {MAX_TRIES} times over 'begin'" in (await call)[1]

    played(story)
