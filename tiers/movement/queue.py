"""The write-behind queue: transfers written in the background, bounded in bytes and number."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from itertools import islice
from typing import NamedTuple

from tiers.movement.transfers import Transfer

_MAX_TRANSFERS = 10_000
_AT_ONCE = 64


class PendingWrite(NamedTuple):
    """A transfer that waits to be written."""

    transfer: Transfer
    bytes: int
    write: Callable[[], Awaitable[None]]
    """Called only if nothing newer has been stored meanwhile. It must not raise."""


class WriteBehindQueue:
    """Writes transfers in order, many at once.

    Args:
        max_bytes: of the values that wait; a transfer that doesn't fit is dropped and counted.
    """

    def __init__(self, max_bytes: int) -> None:
        self.dropped = 0
        self._max_bytes = max_bytes
        self._queue: deque[PendingWrite] = deque()
        self._queue_bytes = 0
        self._running: asyncio.Task[None] | None = None

    def offer(self, pending: PendingWrite) -> None:
        """Take over a transfer, to write or to drop it. Never waits."""
        has_room = self._queue_bytes + pending.bytes <= self._max_bytes
        if not has_room or len(self._queue) >= _MAX_TRANSFERS:
            self.dropped += 1
            pending.transfer.release()
            return
        self._queue.append(pending)
        self._queue_bytes += pending.bytes
        if self._running is None:
            self._running = asyncio.create_task(self._run())

    async def drain(self) -> None:
        """Wait until the queue is empty."""
        if self._running is not None:
            await self._running

    async def _run(self) -> None:
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), _AT_ONCE))]
            await write_all(batch)
            self._queue_bytes -= sum(pending.bytes for pending in batch)
        self._running = None


async def write_all(transfers: Iterable[PendingWrite]) -> None:
    """Write transfers, many at once, except those that are outdated."""
    rest = iter(transfers)
    # Together, since the disk tier commits in groups.
    while batch := list(islice(rest, _AT_ONCE)):
        await asyncio.gather(*map(_write, batch))


async def _write(pending: PendingWrite) -> None:
    with pending.transfer:
        async with pending.transfer.writing() as is_latest:
            if is_latest:
                await pending.write()
