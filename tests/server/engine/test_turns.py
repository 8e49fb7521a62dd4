"""Turns of the event loop: how many steps one takes, in which order, and who waits."""

import asyncio
from collections.abc import Iterator
from itertools import count

import pytest

from server.engine.turns import Turns
from tests.waiting import HANGS_S


def clock(step_s: float) -> Iterator[float]:
    """Return the time at each look, which is later by `step_s`."""
    return (number * step_s for number in count())


async def turns_of(turns: Turns, number: int) -> list[int]:
    """Do steps at once; return in which turn of the loop each was done."""
    loop, turn, done = asyncio.get_running_loop(), 0, []

    def counted() -> None:
        nonlocal turn
        turn += 1
        if len(done) < number:
            loop.call_soon(counted)

    async def step(name: int) -> None:
        await turns.take()
        done.append((name, turn))

    loop.call_soon(counted)
    async with asyncio.timeout(HANGS_S):
        await asyncio.gather(*map(step, range(number)))
    assert [name for name, _ in done] == list(range(number))
    return [turn for _, turn in done]


async def test_steps_that_take_long_get_a_turn_each() -> None:
    done = await turns_of(Turns(clock(1.0).__next__), 100)
    assert len(set(done)) == 100


async def test_short_steps_share_turns_and_no_turn_takes_all() -> None:
    turns = Turns(clock(0.0).__next__)
    done = await turns_of(turns, 1000)
    most = max(map(done.count, set(done)))
    assert 10 < most < 40
    # Once steps take longer, a turn has fewer again.
    turns._clock = clock(1.0).__next__
    assert len(set((await turns_of(turns, 100))[70:])) == 30


@pytest.mark.parametrize("step_s", [0.0, 1.0])
async def test_a_step_alone_never_waits(step_s: float) -> None:
    turns = Turns(clock(step_s).__next__)
    for _ in range(10):
        with pytest.raises(StopIteration):
            turns.take().send(None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_who_leaves_while_waiting_holds_up_nobody() -> None:
    turns = Turns(clock(1.0).__next__)
    waiting = [asyncio.create_task(turns.take()) for _ in range(10)]
    await asyncio.sleep(0)
    for task in waiting[1:9]:
        task.cancel()
    async with asyncio.timeout(HANGS_S):
        await waiting[9]
    assert all(task.cancelled() for task in waiting[1:9])
