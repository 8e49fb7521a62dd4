"""The memory tier's backend: least recently used entries leave first, bounded in bytes.

Owns the entries of this process. Invariant: `usage.bytes` is the sum of what the entries cost
and never exceeds `max_bytes`.
"""

import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from tiers.backend import ByteCache

_OVERHEAD_BYTES = sys.getsizeof("k" * 64) + sys.getsizeof(b"") + sys.getsizeof((0, 0)) + 24 + 120
"""Key, object headers, expiry, and the entry's share of the dictionary and of its linked list."""


class MemoryCache(ByteCache):
    """An in-process LRU cache of at most `max_bytes`, keys and overhead included.

    A value that alone is larger than the cache is refused rather than emptying the cache for it.
    """

    NAME = "memory"

    def __init__(
        self,
        max_bytes: int,
        *,
        clock: Callable[[], float] = time.time,
        namespace: str | None = None,
    ) -> None:
        super().__init__(clock=clock, namespace=namespace)
        self.max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[bytes, float | None]] = OrderedDict()

    def read(self, key: str) -> bytes | None:
        found = self._entries.get(key)
        if found is None:
            return None
        value, expires_at = found
        if expires_at is not None and expires_at <= self.clock():
            self._drop(key)
            self.usage.expirations += 1
            return None
        self._entries.move_to_end(key)
        return value

    async def write(self, key: str, value: bytes, expires_at: float | None) -> bool:
        self._drop(key)
        cost = len(value) + _OVERHEAD_BYTES
        if cost > self.max_bytes:
            self.usage.refused += 1
            return False
        while self.usage.bytes + cost > self.max_bytes:
            self._drop(next(iter(self._entries)))
            self.usage.evictions += 1
        self._entries[key] = (value, expires_at)
        self.usage.bytes += cost
        self.usage.entries += 1
        return True

    async def touch(self, key: str, expires_at: float | None) -> bool:
        value = self.read(key)
        if value is None:
            return False
        self._entries[key] = (value, expires_at)
        return True

    async def remove(self, key: str) -> bool:
        return self._drop(key)

    def keys(self) -> Iterable[str]:
        return list(self._entries)

    def _drop(self, key: str) -> bool:
        found = self._entries.pop(key, None)
        if found is None:
            return False
        self.usage.bytes -= len(found[0]) + _OVERHEAD_BYTES
        self.usage.entries -= 1
        return True
