"""Demotion: what a nearer tier evicts is written to farther ones."""

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from functools import partial

from tiers.frequency import FrequencySketch
from tiers.movement.queue import PendingWrite, WriteBehindQueue, write_all
from tiers.movement.transfers import Transfers
from tiers.purges.purges import Purges
from tiers.tier import Tier


class WritePolicy(StrEnum):
    """When entries reach the farther tiers."""

    ON_INSERT = "on_insert"
    """At once: nothing is lost."""
    ON_EVICT = "on_evict"
    """When the nearest tier evicts them, and at the end: fewer writes, lost by kill -9."""


class Demotion:
    """Writes what a tier evicts to farther tiers, unless it is there, too cold, or of no use.

    Args:
        to: the farther tiers.
        frequency: a key of which it knows nothing any more is too cold.
        copies: the chain's, so that a store outdates what waits here.
        purges: the chain's.
        max_bytes: of the queue; what doesn't fit is dropped and counted.
        clock: returns Unix seconds.
    """

    def __init__(
        self,
        farther: Sequence[Tier],
        frequency: FrequencySketch,
        transfers: Transfers,
        purges: Purges,
        *,
        max_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._farther, self._frequency, self._transfers = tuple(farther), frequency, transfers
        self._purges, self._clock = purges, clock
        self._queue = WriteBehindQueue(max_bytes)

    @property
    def dropped(self) -> int:
        """How many found no room in the queue."""
        return self._queue.dropped

    def offer(self, key: str, value: bytes, expires_at: float | None) -> None:
        """Take what was evicted; never waits."""
        if expires_at is not None and self._frequency.estimate(key) > 0:
            self._queue.offer(self._pending(key, value, expires_at))

    async def write_all(self, entries: Iterable[tuple[str, bytes, float | None]]) -> None:
        """Write entries that were not evicted, many at once."""
        await write_all(
            self._pending(key, value, expires_at)
            for key, value, expires_at in entries
            if expires_at is not None
        )

    async def drain(self) -> None:
        """Write what is left in the queue."""
        await self._queue.drain()

    def _pending(self, key: str, value: bytes, expires_at: float) -> PendingWrite:
        write = partial(self._demote, key, value, expires_at)
        return PendingWrite(self._transfers.begin(key), len(value), write)

    async def _demote(self, key: str, value: bytes, expires_at: float) -> None:
        if self._purges.is_encoded_known_purged(key, value):
            return
        for tier in self._farther:
            left_s = expires_at - self._clock()
            if left_s > 0 and not await tier.holds(key):
                demoted = await tier.put(key, value, left_s)
                tier.counts.demotions += demoted
