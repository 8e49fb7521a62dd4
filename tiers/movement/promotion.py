"""Promotion: what a farther tier had is copied to nearer ones."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

from tiers.entry import Entry
from tiers.frequency import FrequencySketch
from tiers.movement.queue import PendingWrite, WriteBehindQueue
from tiers.movement.transfers import Transfer
from tiers.tier import Tier


class FarHit(NamedTuple):
    """What a lookup has found in a farther tier."""

    key: str
    value: bytes
    """The entry as it is encoded."""
    entry: Entry
    frequency: int
    """How often it was asked for lately."""
    older_in: Collection[Tier]
    """The nearer tiers that hold an older entry under the key."""


class Promotion:
    """Copies an entry to a tier if it is asked for often, or if that holds an older one.

    Often is at least `promote_after` times lately, and more often than what would be pushed out. A
    tier that writes at once gets it before the request goes on, any other in the background.

    Args:
        frequency: tells how often what would be pushed out was asked for.
        promote_after: a number of requests.
        max_bytes: of what waits in the background; what doesn't fit isn't promoted.
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
        """How many found no room in the queue."""
        return self._queue.dropped

    async def promote(self, transfer: Transfer, hit: FarHit, tiers: Sequence[Tier]) -> None:
        """Promote to those of `tiers` that should have it; takes `copy` over."""
        tiers = [tier for tier in tiers if self._is_worth(hit, tier)]
        now = [tier for tier in tiers if tier.writes_at_once]
        later = [tier for tier in tiers if not tier.writes_at_once]
        try:
            if now:
                async with transfer.writing() as is_latest:
                    if is_latest:
                        await self._write(hit, now)
        except BaseException:
            transfer.release()
            raise
        if later:
            write = partial(self._write, hit, later)
            self._queue.offer(PendingWrite(transfer, len(hit.value), write))
        else:
            transfer.release()

    async def drain(self) -> None:
        """Write what is left in the queue."""
        await self._queue.drain()

    def _is_worth(self, hit: FarHit, tier: Tier) -> bool:
        if tier in hit.older_in:
            return True
        if hit.frequency < self._promote_after:
            return False
        victim = tier.victim(len(hit.value))
        return victim is None or hit.frequency > self._frequency.estimate(victim)

    async def _write(self, hit: FarHit, tiers: Sequence[Tier]) -> None:
        for tier in tiers:
            left_s = hit.entry.kept_until - self._clock()
            if left_s > 0 and (tier in hit.older_in or not await tier.holds(hit.key)):
                promoted = await tier.put(hit.key, hit.value, left_s)
                tier.counts.promotions += promoted
