"""A bulkhead: a bound on the calls to one backend that are under way at the same time.

So a slow backend holds up a few callers, each for no longer than a deadline (Nygard, «Release It!»,
2018, chapter 5).
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class BusyError(Exception):
    """`max_calls` calls were under way until the deadline."""


class Bulkhead:
    """Runs at most `max_calls` calls at the same time.

    A call that misses its deadline goes on without its caller, and keeps its place: a connection
    that takes longer than a caller waits serves the callers that follow.

    Args:
        max_calls: each call may need a connection of its own.
        deadline_s: seconds that a caller waits for a place, and then for its call.
        limit_s: seconds after which a call is cancelled.
    """

    def __init__(self, max_calls: int, deadline_s: float, *, limit_s: float) -> None:
        self._deadline_s, self._limit_s = deadline_s, limit_s
        self._places = asyncio.Semaphore(max_calls)
        self._running: set[asyncio.Task[Any]] = set()

    async def run(
        self, call: Callable[[], Coroutine[Any, Any, T]], *, deadline_s: float | None = None
    ) -> T:
        """Return what `call` returns, by another deadline if one is given.

        Raises:
            BusyError: no place became free in time; `call` isn't called.
            TimeoutError: the call has begun and isn't done in time.
        """
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                await self._places.acquire()
        except TimeoutError:
            raise BusyError from None
        task = asyncio.create_task(self._limited(call))
        self._running.add(task)
        task.add_done_callback(self._release)
        # The deadline starts when the call has, however late the event loop is.
        await asyncio.sleep(0)
        await asyncio.wait([task], timeout=deadline_s)
        if not task.done():
            raise TimeoutError
        return task.result()

    async def close(self) -> None:
        """Cancel the calls that are under way."""
        running = list(self._running)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    async def _limited(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with asyncio.timeout(self._limit_s):
            return await call()

    def _release(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        self._places.release()
        if not task.cancelled():
            # Retrieve the exception, since the caller may have given up waiting for it.
            task.exception()
