"""Background work of a chain: demotion, sharing purges, and what outlives a restart.

The disk tier keeps the frequency sketch, which is saved every few minutes and at shutdown. After a
start, the nearest tier is refilled with the disk tier's hottest entries, those it would evict last.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from tiers.backend import BlobStore
from tiers.frequency import FrequencySketch
from tiers.movement.demotion import Demotion, WritePolicy
from tiers.purges.purges import Purges
from tiers.shared.purges import SharedPurges
from tiers.tier import Tier

logger = logging.getLogger(__name__)

_SKETCH = "frequency"
_SAVE_EVERY_S = 300
_REFILL_AT_ONCE = 16
_REFILL_AT_ONCE_BYTES = 1024**2


class BackgroundWork:
    """What runs beside requests while a chain is in use.

    Args:
        tiers: the chain's.
        disk: the backend of the disk tier, if there is one.
        frequency: the chain's.
        demotion: from the nearest tier.
        purges: the chain's.
        shared_purges: shares them with other machines, if there is a shared tier.
        write: with `ON_EVICT`, `close` writes the nearest tier's entries to the others.
        clock: returns Unix seconds.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        disk: BlobStore | None,
        frequency: FrequencySketch,
        demotion: Demotion,
        purges: Purges,
        *,
        shared_purges: SharedPurges | None = None,
        write: WritePolicy,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._tiers, self._nearest = tiers, tiers[0] if tiers else None
        self._disk, self._frequency, self._demotion = disk, frequency, demotion
        self._purges, self._write, self._clock = purges, write, clock
        self._shared_purges = shared_purges
        self._tasks: list[asyncio.Task[None]] = []
        self.restored = asyncio.Event()
        """Set when the sketch is loaded and the nearest tier refilled, as far as possible."""

    @property
    def dropped(self) -> int:
        """How many demotions found no room in the queue."""
        return self._demotion.dropped

    async def learn_purges(self) -> None:
        """Learn what other machines have purged, if they can be asked."""
        # The first connection may take longer than a poll may.
        if (shared := self._shared_purges) is not None and (
            await shared.sync() or await shared.sync()
        ):
            await asyncio.gather(*(tier.connect() for tier in self._tiers))

    async def share_purges(self) -> None:
        """Learn what other machines have purged, now and until `close`."""
        # Entries purged while this process was down must not be given out now.
        await self.learn_purges()
        if self._shared_purges is not None:
            self._tasks.append(asyncio.create_task(self._shared_purges.run()))

    async def start(self) -> None:
        """Learn what other machines have purged, then load and refill in the background."""
        await self.share_purges()
        if self._disk is not None:
            self._tasks.append(asyncio.create_task(self._run(self._disk)))

    async def load_sketch(self) -> None:
        """Load the frequency sketch from the disk tier's file, if that is open."""
        if self._disk is not None and (saved := self._disk.load(_SKETCH)) is not None:
            try:
                for _ in self._frequency.load(saved):
                    # Requests go first.
                    await asyncio.sleep(0)
            except ValueError as exc:
                logger.info("the frequency sketch starts empty: %s", exc)

    async def drain(self) -> None:
        """Finish the demotions that are under way."""
        await self._demotion.drain()

    async def close(self) -> None:
        """Finish demotions and save the sketch; the tiers must still be open."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.drain()
        if self._write is WritePolicy.ON_EVICT and self._nearest is not None:
            # The process may be killed before all is written. Of equals, the newest go first.
            entries = reversed(list(self._nearest.entries()))
            hottest = sorted(entries, key=lambda entry: -self._frequency.estimate(entry[0]))
            await self._demotion.write_all(hottest)
        # Don't overwrite a sketch that wasn't loaded; a file that isn't open can't be written.
        if self._disk is not None and self.restored.is_set():
            await self._save(self._disk)

    async def _run(self, disk: BlobStore) -> None:
        try:
            await disk.opened()
        except OSError:
            # The disk tier has logged why.
            self.restored.set()
            return
        await self._restore(disk)
        while True:
            await asyncio.sleep(_SAVE_EVERY_S)
            await self._save(disk)

    async def _restore(self, disk: BlobStore) -> None:
        await self.load_sketch()
        if self._nearest is not None and self._nearest.backend is not disk:
            await _refill(self._nearest, disk, self._purges, self._clock)
        self.restored.set()

    async def _save(self, disk: BlobStore) -> None:
        if not await disk.save(_SKETCH, self._frequency.dump()):
            logger.warning("the frequency sketch could not be saved")


async def _refill(
    nearest: Tier, disk: BlobStore, purges: Purges, clock: Callable[[], float]
) -> None:
    """Copy the hottest entries into the nearest tier, hottest first, until that is full."""
    number = read_bytes = 0
    for key, value, expires_at in disk.hottest():
        left_s = 0 if expires_at is None else expires_at - clock()
        if (
            left_s > 0
            and not await nearest.holds(key)
            and not purges.is_encoded_known_purged(key, value)
        ):
            if nearest.victim(len(value)) is not None:
                return
            await nearest.put(key, value, left_s)
        number += 1
        read_bytes += len(value)
        if number >= _REFILL_AT_ONCE or read_bytes >= _REFILL_AT_ONCE_BYTES:
            # Requests go first.
            number = read_bytes = 0
            await asyncio.sleep(0)
