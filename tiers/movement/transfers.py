"""Copies of entries on their way from one tier to another, and the stores that outdate them.

An answer may be stored while an older one under its key waits to be demoted, or is on its way from
a far tier to a nearer one. Invariant: a copy is written only if nothing has been stored under its
key since it was taken, nothing is being stored, and no other copy is being written.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self


class _Traffic:
    """What goes on under one key."""

    __slots__ = ("lock", "stores", "users")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.stores = 0
        self.users = 0


class Transfers:
    """Knows the keys under which copies are taken or answers stored, while that lasts."""

    def __init__(self) -> None:
        self._by_key: dict[str, _Traffic] = {}

    def begin(self, key: str) -> "Transfer":
        """Return a copy that stands for what a tier holds, or held, from now on."""
        return Transfer(self, key)

    @asynccontextmanager
    async def storing(self, key: str) -> AsyncIterator[None]:
        """Wait until no copy under `key` is being written, and outdate those that are taken."""
        traffic = self._enter(key)
        try:
            async with traffic.lock:
                try:
                    yield
                finally:
                    # What was taken meanwhile may be of before.
                    traffic.stores += 1
        finally:
            self._leave(key, traffic)

    def __len__(self) -> int:
        return len(self._by_key)

    def _enter(self, key: str) -> _Traffic:
        traffic = self._by_key.get(key)
        if traffic is None:
            traffic = self._by_key[key] = _Traffic()
        traffic.users += 1
        return traffic

    def _leave(self, key: str, traffic: _Traffic) -> None:
        traffic.users -= 1
        if not traffic.users:
            del self._by_key[key]


class Transfer:
    """One copy that was taken. Use it as a context manager, or release it once."""

    __slots__ = ("_copies", "_stores", "_traffic", "key")

    def __init__(self, copies: Transfers, key: str) -> None:
        self.key = key
        self._copies = copies
        self._traffic = copies._enter(key)
        self._stores = self._traffic.stores

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Note that it won't be written any more."""
        self._copies._leave(self.key, self._traffic)

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[bool]:
        """Tell whether it may be written, and hold up stores meanwhile."""
        traffic = self._traffic
        if traffic.lock.locked():
            yield False
            return
        async with traffic.lock:
            # A store that waited for the lock goes first.
            yield self._stores == traffic.stores
