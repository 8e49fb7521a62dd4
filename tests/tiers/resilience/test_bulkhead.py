"""A bulkhead: calls are bounded, and one that misses its deadline goes on without its caller."""

import asyncio
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.waiting import HANGS_S
from tiers.resilience.bulkhead import Bulkhead, BusyError


async def test_a_call_that_misses_its_deadline_goes_on_and_keeps_its_place() -> None:
    """So a slow connection is made once, and not begun again and again."""
    go, ended = asyncio.Event(), []

    async def call() -> int:
        await go.wait()
        ended.append(1)
        return 1

    calls = Bulkhead(2, HANGS_S, limit_s=HANGS_S)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await calls.run(call, deadline_s=0.01)
    for _ in range(2):
        with pytest.raises(BusyError):
            await calls.run(call, deadline_s=0.01)
    go.set()
    assert await calls.run(call) == 1
    assert len(ended) == 3
    go.clear()
    with pytest.raises(TimeoutError):
        await calls.run(call, deadline_s=0.01)
    await calls.close()
    assert len(asyncio.all_tasks()) == 1


async def test_a_call_ends_at_its_limit_and_frees_its_place() -> None:
    calls = Bulkhead(1, HANGS_S, limit_s=0.01)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await calls.run(asyncio.Event().wait)


async def test_an_event_loop_that_is_late_in_every_turn_reads_the_reply() -> None:
    """The deadline is for what is elsewhere, and its reply is there when the loop looks."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)

    async def hog() -> None:
        while True:
            time.sleep(0.003)
            await asyncio.sleep(0)

    async def call() -> bytes:
        theirs.send(b"!")
        return await reader.readexactly(1)

    hogging, calls = asyncio.create_task(hog()), Bulkhead(1, 0.001, limit_s=HANGS_S)
    for _ in range(20):
        assert await calls.run(call) == b"!"
    hogging.cancel()
    writer.close()
    theirs.close()


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
async def test_cancelled_callers_leak_no_place(steps: list[tuple[int, int]]) -> None:
    """Each call takes so many turns of the loop, and its caller is cancelled after so many."""
    calls = Bulkhead(2, HANGS_S, limit_s=HANGS_S)

    async def call(turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)

    async def cancelled(turns: int, after: int) -> None:
        running = asyncio.create_task(calls.run(lambda: call(turns)))
        await call(after)
        running.cancel()
        await asyncio.wait([running])

    await asyncio.gather(*(cancelled(*step) for step in steps))
    await asyncio.gather(*calls._running)
    await asyncio.sleep(0)
    assert calls._places._value == 2
    assert not calls._places.locked()
