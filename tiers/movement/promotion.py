"""Promotion: what a farther tier had is copied to nearer ones."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

from tiers.entry import Entry
from tiers.frequency import FrequencySketch
from tiers.movement.copies import Transfer
from tiers.movement.queue import PendingWrite, WriteBehindQueue
from tiers.tier import Tier


class FarHit(NamedTuple):
    """What a lookup has found in a farther tier."""

    key: str
    value: bytes
    """The entry as it is encoded."""
    entry: Entry
    asked: int
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

    async def promote(self, copy: Transfer, found: FarHit, tiers: Sequence[Tier]) -> None:
        """Promote to those of `tiers` that should have it; takes `copy` over."""
        tiers = [tier for tier in tiers if self._is_worth(found, tier)]
        now = [tier for tier in tiers if tier.in_memory]
        later = [tier for tier in tiers if not tier.in_memory]
        try:
            if now:
                async with copy.writing() as is_latest:
                    if is_latest:
                        await self._write(found, now)
        except BaseException:
            copy.release()
            raise
        if later:
            write = partial(self._write, found, later)
            self._queue.offer(PendingWrite(copy, len(found.value), write))
        else:
            copy.release()

    async def finish(self) -> None:
        """Write what is left in the queue."""
        await self._queue.finish()

    def _is_worth(self, found: FarHit, tier: Tier) -> bool:
        if tier in found.older_in:
            return True
        if found.asked < self._promote_after:
            return False
        victim = tier.victim(len(found.value))
        return victim is None or found.asked > self._frequency.estimate(victim)

    async def _write(self, found: FarHit, tiers: Sequence[Tier]) -> None:
        for tier in tiers:
            left_s = found.entry.kept_until - self._clock()
            if left_s > 0 and (tier in found.older_in or not await tier.holds(found.key)):
                promoted = await tier.put(found.key, found.value, left_s)
                tier.counts.promotions += promoted
