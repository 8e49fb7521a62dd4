"""Calls to a backend elsewhere: few at once, and waited for no longer than a deadline."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_SLICES = 8
"""More turns of the event loop than a call takes to be sent and its reply to be read."""


class BusyError(Exception):
    """So many calls are under way that another one waited in vain for its turn."""


async def _wait(task: asyncio.Task[Any], deadline_s: float) -> None:
    """Wait until a task is done, or its deadline is over; it goes on then.

    The deadline is for what the task waits for. So it passes in slices, and one in which our own
    event loop is late, for all that goes on there, counts as one that isn't.

    Raises:
        TimeoutError: it isn't done.
    """
    for _ in range(_SLICES):
        await asyncio.wait([task], timeout=deadline_s / _SLICES)
        if task.done():
            return
    raise TimeoutError


async def in_time(call: Coroutine[Any, Any, T], deadline_s: float) -> T:
    """Return what `call` does, which is ended at its deadline.

    Raises:
        TimeoutError: it isn't done.
    """
    task = asyncio.create_task(call)
    try:
        await _wait(task, deadline_s)
    finally:
        if task.cancel():
            await asyncio.gather(task, return_exceptions=True)
    return task.result()


class Bulkhead:
    """Makes at most `most` calls at once.

    A call that isn't done at its deadline goes on without its caller, and keeps its place: a
    connection that takes longer to be made than a caller can wait is there for those that follow.

    Args:
        most: a few keep a connection each busy, and with more each would take longer.
        deadline_s: seconds that a caller waits for its turn, and then for its call.
    """

    def __init__(self, most: int, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._places = asyncio.Semaphore(most)
        self._running: set[asyncio.Task[Any]] = set()

    async def run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what `call` does, which must end by itself.

        Raises:
            BusyError: its turn didn't come.
            TimeoutError: it has begun and isn't done.
        """
        if self._places.locked():
            await self._take_place()
        else:
            await self._places.acquire()
        task = asyncio.create_task(call())
        self._running.add(task)
        task.add_done_callback(self._end)
        await _wait(task, self._deadline_s)
        return task.result()

    async def _take_place(self) -> None:
        place = asyncio.create_task(self._places.acquire())
        try:
            await _wait(place, self._deadline_s)
        except TimeoutError:
            place.cancel()
            raise BusyError from None
        except asyncio.CancelledError:
            if not place.cancel():
                # It came in the moment in which nobody wanted it any more.
                self._places.release()
            raise

    async def close(self) -> None:
        """End the calls that are under way."""
        running = list(self._running)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        self._places.release()
        if not task.cancelled():
            # Retrieved, since nobody may be waiting for it any more.
            task.exception()
