"""Copies that are written in the background, bounded in bytes and in number."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from itertools import islice
from typing import NamedTuple

from tiers.movement.transfers import Transfer

_MOST_COPIES = 10_000
_AT_ONCE = 64


class PendingWrite(NamedTuple):
    """A copy that is to be written."""

    transfer: Transfer
    bytes: int
    write: Callable[[], Awaitable[None]]
    """Called only if nothing newer has been stored meanwhile; raises nothing."""


class WriteBehindQueue:
    """Writes copies in the order in which they came, many at once.

    Args:
        max_bytes: of the values that wait; what doesn't fit is dropped and counted.
    """

    def __init__(self, max_bytes: int) -> None:
        self.dropped = 0
        self._max_bytes = max_bytes
        self._queue: deque[PendingWrite] = deque()
        self._queue_bytes = 0
        self._running: asyncio.Task[None] | None = None

    def offer(self, pending: PendingWrite) -> None:
        """Take a copy over, to write or to drop it; never waits."""
        has_room = self._queue_bytes + pending.bytes <= self._max_bytes
        if not has_room or len(self._queue) >= _MOST_COPIES:
            self.dropped += 1
            pending.transfer.release()
            return
        self._queue.append(pending)
        self._queue_bytes += pending.bytes
        if self._running is None:
            self._running = asyncio.create_task(self._run())

    async def drain(self) -> None:
        """Write what is left."""
        if self._running is not None:
            await self._running

    async def _run(self) -> None:
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), _AT_ONCE))]
            await write_all(batch)
            self._queue_bytes -= sum(waiting.bytes for waiting in batch)
        self._running = None


async def write_all(copies: Iterable[PendingWrite]) -> None:
    """Write copies, many at once, each unless it is outdated."""
    rest = iter(copies)
    # Together, since the disk tier commits together what comes together.
    while batch := list(islice(rest, _AT_ONCE)):
        await asyncio.gather(*map(_write, batch))


async def _write(waiting: PendingWrite) -> None:
    with waiting.transfer:
        async with waiting.transfer.writing() as is_latest:
            if is_latest:
                await waiting.write()
