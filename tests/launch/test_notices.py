"""What the driver and the slots tell each other arrives, and nobody waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from launch.notices import Listener, Notice, NoticeBoard, Notices
from launch.saves import SaveClock


def test_a_question_is_answered_at_once_where_there_is_news_and_later_where_there_is_none() -> None:
    async def talk() -> list[Any]:
        board = NoticeBoard()
        seen, first = await board.look(-1)
        question = asyncio.create_task(board.look(seen))
        await asyncio.sleep(0.01)
        was_open = not question.done()
        await board.post(Notice(is_held=True))
        return [first, was_open, await question, await board.look(1, within_s=0.01)]

    first, was_open, answer, nothing_new = asyncio.run(talk())
    assert first == Notice() and was_open
    assert answer == nothing_new == (1, Notice(is_held=True))


def test_lines_are_given_once_and_saved_trials_stay() -> None:
    async def talk() -> list[Any]:
        board = NoticeBoard()
        await board.saved("a")
        await board.tell("full")
        return [await board.said(), await board.said()]

    assert asyncio.run(talk()) == [({"a"}, ["full"]), ({"a"}, [])]


def test_without_a_driver_there_are_no_notices() -> None:
    listener = Listener(None)
    listener.tell("nobody reads this")
    listener.say_saved("a")
    assert listener.heard() == Notice()


def test_a_save_is_due_by_time_and_takes_a_small_share_of_it() -> None:
    clock = SaveClock(0.01)
    assert not clock.is_due()
    time.sleep(0.02)
    assert clock.is_due()
    clock.note(0.001)  # 2 % of 50 ms
    time.sleep(0.02)
    assert not clock.is_due()
    time.sleep(0.04)
    assert clock.is_due()


def until(condition: Callable[[], bool], limit_s: float = 10) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(60)
def test_notices_go_both_ways_and_looking_costs_next_to_nothing(ray_cluster: Any) -> None:
    notices = Notices()
    listener = Listener(notices.actor)
    assert listener.heard() == Notice()
    notices.drain({"node": 7.0})
    notices.hold()
    assert until(lambda: listener.heard() == Notice(is_held=True, draining={"node": 7.0}))
    listener.say_saved("a")
    listener.tell("the disk is full")
    heard: list[str] = []
    assert until(lambda: "a" in notices.saved())
    assert until(lambda: bool(heard.extend(notices.lines()) or heard))
    assert heard == ["the disk is full"]
    started = time.perf_counter()
    for _ in range(200):
        listener.heard()
    assert (
        time.perf_counter() - started
    ) / 200 < 0.01  # a message to another process and back takes longer when cores are shared
    ray_cluster.kill(notices.actor)
    assert until(lambda: listener.heard() == Notice(is_held=True, draining={"node": 7.0}))  # the last that was heard
    assert notices.saved() == {"a"}
