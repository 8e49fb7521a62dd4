"""Transfers: entries on their way from one tier to another, and the stores that outdate them.

An answer may be stored while an older one under its key waits to be demoted or promoted. Invariant:
a transfer is written only if since it began nothing has been stored under its key, nothing is being
stored, and no other transfer is being written.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self


class _Traffic:
    """The transfers and stores under one key."""

    __slots__ = ("lock", "stores", "users")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.stores = 0
        self.users = 0


class Transfers:
    """The keys under which transfers or stores are under way."""

    def __init__(self) -> None:
        self._by_key: dict[str, _Traffic] = {}

    def begin(self, key: str) -> "Transfer":
        """Begin a transfer of what a tier holds now under `key`, or held until now."""
        return Transfer(self, key)

    @asynccontextmanager
    async def storing(self, key: str) -> AsyncIterator[None]:
        """Wait until no transfer under `key` is being written; outdate those that have begun."""
        traffic = self.enter(key)
        try:
            async with traffic.lock:
                try:
                    yield
                finally:
                    # Transfers that began meanwhile may carry the older entry.
                    traffic.stores += 1
        finally:
            self.leave(key, traffic)

    def __len__(self) -> int:
        return len(self._by_key)

    def enter(self, key: str) -> _Traffic:
        """Count one more user of the key's traffic, until `leave`."""
        traffic = self._by_key.get(key)
        if traffic is None:
            traffic = self._by_key[key] = _Traffic()
        traffic.users += 1
        return traffic

    def leave(self, key: str, traffic: _Traffic) -> None:
        """Count one user less."""
        traffic.users -= 1
        if not traffic.users:
            del self._by_key[key]


class Transfer:
    """One transfer. Use it as a context manager, or release it once."""

    __slots__ = ("_stores", "_traffic", "_transfers", "key")

    def __init__(self, transfers: Transfers, key: str) -> None:
        self.key = key
        self._transfers = transfers
        self._traffic = transfers.enter(key)
        self._stores = self._traffic.stores

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """End the transfer; it won't be written any more."""
        self._transfers.leave(self.key, self._traffic)

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[bool]:
        """Yield whether the transfer may be written. Stores wait until the context ends."""
        traffic = self._traffic
        if traffic.lock.locked():
            yield False
            return
        async with traffic.lock:
            # A store may have come first while this waited for the lock.
            yield self._stores == traffic.stores
