"""A tier: any aiocache backend with a name and a deadline.

The one place that catches a backend's failure, counts it, and makes it a miss: a cache never
fails a request. Cancellation passes through.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from aiocache.base import BaseCache

from tiers.answer import Entry
from tiers.backend import ByteCache

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Counts:
    """What happened at a tier since the process started."""

    hits: int = 0
    misses: int = 0
    stores: int = 0
    promotions: int = 0
    """Stores of what a farther tier had."""
    demotions: int = 0
    """Stores of what a nearer tier evicted."""
    errors: int = 0


class Tier:
    """A named level of the chain.

    Args:
        name: what reports call it.
        backend: an aiocache backend that stores bytes.
        deadline_s: seconds that one call may take; 0 for a backend that answers at once.
    """

    def __init__(self, name: str, backend: BaseCache, *, deadline_s: float = 0) -> None:
        self.name = name
        self.backend = backend
        self.deadline_s = deadline_s
        # Our own backends answer at once; aiocache's layers cost more than such a read.
        self._near = backend if isinstance(backend, ByteCache) else None
        self.counts = Counts()

    async def get(self, key: str, *, counted: bool = True) -> tuple[bytes, Entry] | None:
        """Return the entry under `key`, encoded and decoded, or `None`.

        Unless `counted`, it is neither a hit nor a miss.
        """
        try:
            value: bytes | None = (
                self._near.read(key)
                if self._near is not None
                else await self.backend.get(key, timeout=self.deadline_s)
            )
        except Exception as exc:
            self._failed("read", exc)
            return None
        if value is not None:
            try:
                entry = Entry.decode(value)
            except ValueError as exc:
                # Of another version of ours; the next answer replaces it.
                logger.debug("the %s tier holds what can't be read: %s", self.name, exc)
            else:
                self.counts.hits += counted
                return value, entry
        self.counts.misses += counted
        return None

    async def put(self, key: str, value: bytes, ttl_s: float) -> bool:
        """Store an encoded entry for `ttl_s` seconds. Returns whether it is stored."""
        try:
            stored = await self.backend.set(key, value, ttl=ttl_s, timeout=self.deadline_s)
        except Exception as exc:
            self._failed("write", exc)
            return False
        self.counts.stores += bool(stored)
        return bool(stored)

    async def remove(self, key: str) -> None:
        """Drop the entry under `key`, if there is one."""
        try:
            await self.backend.delete(key, timeout=self.deadline_s)
        except Exception as exc:
            self._failed("remove", exc)

    async def holds(self, key: str) -> bool:
        """Return whether there is an entry under `key`, which doesn't count as asking for it."""
        try:
            return bool(await self.backend.exists(key, timeout=self.deadline_s))
        except Exception as exc:
            self._failed("read", exc)
            return False

    def victim(self, value_bytes: int) -> str | None:
        """Return the key that would leave first for a value of that size, or `None` for room."""
        return None if self._near is None else self._near.victim(value_bytes)

    def entries(self) -> Iterator[tuple[str, bytes, float | None]]:
        """Yield key, encoded entry and expiry (Unix s) of all, where the backend can tell."""
        return iter(()) if self._near is None else self._near.entries()

    async def close(self) -> None:
        """Flush and release the backend."""
        try:
            await self.backend.close(timeout=None)
        except Exception as exc:
            self._failed("close", exc)

    def _failed(self, action: str, exc: Exception) -> None:
        self.counts.errors += 1
        logger.error("the %s tier failed to %s", self.name, action, exc_info=exc)
