"""Movement between tiers beside requests: demotion, and what is remembered over a restart.

Promotion is the chain's, since a hit leads to it. Two things are remembered in the disk tier: how
often each key was asked for and, by the order in which entries would leave, which are the hottest.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from itertools import islice
from typing import NamedTuple

from tiers.copies import Copies, Copy
from tiers.disk import DiskCache
from tiers.frequency import FrequencySketch
from tiers.tier import Tier

logger = logging.getLogger(__name__)

_SKETCH = "frequency"
_SAVE_EVERY_S = 300
_REFILL_AT_ONCE = 16
_DEMOTE_AT_ONCE = 64


class Write(StrEnum):
    """When entries reach the farther tiers."""

    ON_INSERT = "on_insert"
    """At once: nothing is lost."""
    ON_EVICT = "on_evict"
    """When the nearest tier evicts them, and at the end: fewer writes, lost by kill -9."""


class _Evicted(NamedTuple):
    copy: Copy
    value: bytes
    expires_at: float


class Demotion:
    """Writes what a tier evicts to farther tiers, unless it is there, too cold, or outdated.

    Args:
        to: the farther tiers.
        frequency: a key of which it knows nothing any more is too cold.
        copies: the chain's, so that a store outdates what waits here.
        max_bytes: of the queue; what doesn't fit is dropped and counted.
        clock: returns Unix seconds.
    """

    def __init__(
        self,
        to: Sequence[Tier],
        frequency: FrequencySketch,
        copies: Copies,
        *,
        max_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self.dropped = 0
        self._to, self._frequency, self._copies = tuple(to), frequency, copies
        self._max_bytes, self._clock = max_bytes, clock
        self._queue: deque[_Evicted] = deque()
        self._queue_bytes = 0
        self._running: asyncio.Task[None] | None = None

    def offer(self, key: str, value: bytes, expires_at: float | None) -> None:
        """Take what was evicted; never waits."""
        if expires_at is None or self._frequency.estimate(key) == 0:
            return
        if self._queue_bytes + len(value) > self._max_bytes:
            self.dropped += 1
            return
        self._queue.append(_Evicted(self._copies.take(key), value, expires_at))
        self._queue_bytes += len(value)
        if self._running is None:
            self._running = asyncio.create_task(self._run())

    async def write_all(self, entries: Iterable[tuple[str, bytes, float | None]]) -> None:
        """Write entries that were not evicted, many at once."""
        taken = (
            _Evicted(self._copies.take(key), value, expires_at)
            for key, value, expires_at in entries
            if expires_at is not None
        )
        while batch := list(islice(taken, _DEMOTE_AT_ONCE)):
            await asyncio.gather(*map(self._demote, batch))

    async def finish(self) -> None:
        """Write what is left in the queue."""
        if self._running is not None:
            await self._running

    async def _run(self) -> None:
        # Together, since the disk tier commits together what comes together.
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), _DEMOTE_AT_ONCE))]
            await asyncio.gather(*map(self._demote, batch))
            self._queue_bytes -= sum(len(evicted.value) for evicted in batch)
        self._running = None

    async def _demote(self, evicted: _Evicted) -> None:
        copy, value, expires_at = evicted
        with copy:
            async with copy.writing() as is_latest:
                for tier in self._to if is_latest else ():
                    left_s = expires_at - self._clock()
                    if left_s > 0 and not await tier.holds(copy.key):
                        demoted = await tier.put(copy.key, value, left_s)
                        tier.counts.demotions += demoted


class Movement:
    """What goes on beside requests while a chain is in use.

    Args:
        tiers: the chain's.
        disk: the backend of one of them, which remembers.
        frequency: the chain's.
        demotion: from the nearest tier.
        write: when it is `ON_EVICT`, the nearest tier is written to the others at the end.
        clock: returns Unix seconds.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        disk: DiskCache | None,
        frequency: FrequencySketch,
        demotion: Demotion,
        *,
        write: Write,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._nearest = tiers[0] if tiers else None
        self._disk, self._frequency, self._demotion = disk, frequency, demotion
        self._write, self._clock = write, clock
        self._task: asyncio.Task[None] | None = None
        self.remembered = asyncio.Event()
        """Set when what was remembered has been taken over, as far as it could be."""

    @property
    def dropped(self) -> int:
        """How many demotions found no room in the queue."""
        return self._demotion.dropped

    def start(self) -> None:
        """Take over what was remembered, in the background."""
        if self._disk is not None:
            self._task = asyncio.create_task(self._run(self._disk))

    async def settle(self) -> None:
        """Finish the demotions that are under way."""
        await self._demotion.finish()

    async def close(self) -> None:
        """Finish demotions and save what is to be remembered; the tiers must still be open."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self.settle()
        if self._write is Write.ON_EVICT and self._nearest is not None:
            await self._demotion.write_all(self._nearest.entries())
        # What hasn't been taken over must not be lost, and a file that isn't open can't be written.
        if self._disk is not None and self.remembered.is_set():
            await self._save(self._disk)

    async def _run(self, disk: DiskCache) -> None:
        try:
            await disk.opened()
        except OSError:
            # The tier has said so itself.
            self.remembered.set()
            return
        await self._remember(disk)
        while True:
            await asyncio.sleep(_SAVE_EVERY_S)
            await self._save(disk)

    async def _remember(self, disk: DiskCache) -> None:
        if (saved := disk.load(_SKETCH)) is not None:
            try:
                self._frequency.restore(saved)
            except ValueError as exc:
                logger.info("frequencies start anew: %s", exc)
        if self._nearest is not None and self._nearest.backend is not disk:
            await _refill(self._nearest, disk, self._clock)
        self.remembered.set()

    async def _save(self, disk: DiskCache) -> None:
        if not await disk.save(_SKETCH, self._frequency.dump()):
            logger.warning("the frequencies could not be saved")


async def _refill(nearest: Tier, disk: DiskCache, clock: Callable[[], float]) -> None:
    """Copy the hottest entries into the nearest tier, hottest first, until that is full."""
    for number, (key, value, expires_at) in enumerate(disk.hottest()):
        left_s = 0 if expires_at is None else expires_at - clock()
        if left_s > 0 and not await nearest.holds(key):
            if nearest.victim(len(value)) is not None:
                return
            await nearest.put(key, value, left_s)
        if number % _REFILL_AT_ONCE == 0:
            # Requests go first.
            await asyncio.sleep(0)
