"""The chain of tiers: lookup from the nearest, promotion, storing.

Invariant: a lookup returns the entry last stored under that key, not expired, or a miss.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tiers.answer import Answer, Entry
from tiers.tier import Tier


class Hit(NamedTuple):
    """An entry that was found, and the name of the tier that had it."""

    entry: Entry
    tier: str


class Chain:
    """Tiers in order, nearest first.

    Args:
        tiers: each is asked only when those before it missed.
        ttl_s: seconds for which a stored answer is served.
        max_answer_bytes: a larger answer isn't stored.
        clock: returns Unix seconds.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        ttl_s: float,
        max_answer_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.tiers = tuple(tiers)
        self.ttl_s = ttl_s
        self.max_answer_bytes = max_answer_bytes
        self.clock = clock

    async def lookup(self, key: str) -> Hit | None:
        """Return the entry under `key` and copy it into the tiers before the one that had it."""
        for depth, tier in enumerate(self.tiers):
            found = await tier.get(key)
            if found is None:
                continue
            value, entry = found
            left_s = entry.expires_at - self.clock()
            if left_s <= 0:
                continue
            for nearer in self.tiers[:depth]:
                await nearer.put(key, value, left_s)
            return Hit(entry, tier.name)
        return None

    async def store(self, key: str, answer: Answer) -> bool:
        """Store a finished answer in every tier. Returns whether any tier holds it.

        When this returns, each tier has done what its durability promises.
        """
        if len(answer.content) + len(answer.usage) > self.max_answer_bytes:
            return False
        now = self.clock()
        value = Entry(answer, stored_at=now, expires_at=now + self.ttl_s).encode()
        stored = [await tier.put(key, value, self.ttl_s) for tier in self.tiers]
        return any(stored)

    async def close(self) -> None:
        """Flush and close the tiers, nearest first."""
        for tier in self.tiers:
            await tier.close()
