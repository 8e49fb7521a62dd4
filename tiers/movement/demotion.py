"""Demotion: entries that a nearer tier evicts are written to farther ones."""

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
    """At once, so a kill loses no stored answer."""
    ON_EVICT = "on_evict"
    """When the nearest tier evicts, and at shutdown: fewer writes, but a kill loses answers."""


class Demotion:
    """Writes evicted entries to farther tiers, unless they are there, too cold, expired or purged.

    Args:
        farther: the tiers to write to.
        frequency: an entry whose key has a count of 0 is too cold.
        transfers: the chain's, so that a store outdates what waits here.
        purges: the chain's.
        max_bytes: of the write-behind queue; what doesn't fit is dropped and counted.
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
        """How many demotions found no room in the queue."""
        return self._queue.dropped

    def offer(self, key: str, value: bytes, expires_at: float | None) -> None:
        """Take over an evicted entry. Never waits."""
        if expires_at is not None and self._frequency.estimate(key) > 0:
            self._queue.offer(self._pending(key, value, expires_at))

    async def write_all(self, entries: Iterable[tuple[str, bytes, float | None]]) -> None:
        """Write entries that weren't evicted, many at once."""
        await write_all(
            self._pending(key, value, expires_at)
            for key, value, expires_at in entries
            if expires_at is not None
        )

    async def drain(self) -> None:
        """Wait until the queue is empty."""
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
