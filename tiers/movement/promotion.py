"""Promotion: an entry found in a farther tier is copied to nearer ones."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

from tiers.entry import Entry
from tiers.frequency import FrequencySketch
from tiers.movement.queue import PendingWrite, WriteBehindQueue
from tiers.movement.transfers import Transfer
from tiers.tier import Tier


class FarHit(NamedTuple):
    """An entry that a lookup has found in a farther tier."""

    key: str
    entry: Entry
    frequency: int
    """How often it was requested lately."""
    older_in: Collection[Tier]
    """The nearer tiers that hold an older entry under the key."""


class Promotion:
    """Copies an entry to a tier if it is requested often, or if the tier holds an older one.

    Often means at least `promote_after` times lately, and more often than the entry that would be
    evicted for it. Tiers that write at once are written before the request goes on, all others in
    the background.

    Args:
        frequency: counts the requests of the entry that would be evicted.
        promote_after: a number of requests.
        max_bytes: of the write-behind queue; what doesn't fit isn't promoted.
        clock: returns Unix seconds.
    """

    def __init__(
        self,
        frequency: FrequencySketch,
        *,
        promote_after: int,
        max_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._frequency, self._promote_after, self._clock = frequency, promote_after, clock
        self._queue = WriteBehindQueue(max_bytes)

    @property
    def dropped(self) -> int:
        """How many promotions found no room in the queue."""
        return self._queue.dropped

    async def promote(self, transfer: Transfer, hit: FarHit, tiers: Sequence[Tier]) -> None:
        """Promote `hit` to those of `tiers` that are worth it. Takes over `transfer`."""
        tiers = [
            tier
            for tier in tiers
            if tier in hit.older_in or self.is_worth(hit.entry, hit.frequency, tier)
        ]
        at_once = [tier for tier in tiers if tier.in_memory]
        later = [tier for tier in tiers if not tier.in_memory]
        try:
            if at_once:
                async with transfer.writing() as is_latest:
                    if is_latest:
                        await self._write(hit, at_once)
        except BaseException:
            transfer.release()
            raise
        if later:
            write = partial(self._write, hit, later)
            self._queue.offer(PendingWrite(transfer, hit.entry.encoded_bytes, write))
        else:
            transfer.release()

    async def drain(self) -> None:
        """Wait until the queue is empty."""
        await self._queue.drain()

    def is_worth(self, entry: Entry, frequency: int, tier: Tier) -> bool:
        """Return whether an entry requested that often lately is promoted to a tier."""
        if frequency < self._promote_after:
            return False
        victim = tier.victim(entry.encoded_bytes)
        return victim is None or frequency > self._frequency.estimate(victim)

    async def _write(self, hit: FarHit, tiers: Sequence[Tier]) -> None:
        value = hit.entry.encode()
        for tier in tiers:
            left_s = hit.entry.kept_until - self._clock()
            if left_s > 0 and (tier in hit.older_in or not await tier.holds(hit.key)):
                promoted = await tier.put(hit.key, value, left_s)
                tier.counts.promotions += promoted
