"""The memory tier's backend: entries in this process, bounded in bytes; a policy evicts.

Owns the entries. Invariants: `usage.bytes` is the sum of the entries' costs and, with the policy's
fixed memory, never exceeds `max_bytes` after a call; the policy knows exactly the keys of the
entries.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tiers.backend import ByteCache
from tiers.key import scope_of
from tiers.memory.shares import Shares
from tiers.policies import DEFAULT_POLICY, POLICIES, Policy

_OVERHEAD_BYTES = sys.getsizeof("k" * 64) + sys.getsizeof(b"") + sys.getsizeof((0, 0)) + 24 + 100
"""Key, object headers, expiry and a share of the dictionary, without the policy's overhead."""

OnEvict = Callable[[str, bytes, float | None], None]
"""Called with key, value and expiry (Unix seconds, or `None`) of an evicted entry."""


class MemoryCache(ByteCache):
    """An in-process cache of at most `max_bytes`, keys and overhead included.

    A value larger than the whole cache is refused; nothing is evicted for it. The policy chooses
    the entry that leaves, within the scopes' shares (`tiers.key`).

    Args:
        max_bytes: of all entries together.
        policy: the name of a policy in `POLICIES`, or a policy for at most `max_bytes`.
        on_evict: called after an entry was evicted for room; not after it was removed, replaced or
            had expired. It must not raise.
        clock: returns Unix seconds.
        namespace: aiocache's prefix of keys.

    Raises:
        ValueError: the policy is unknown, or is for more than `max_bytes`.
    """

    NAME = "memory"
    in_memory = True

    def __init__(
        self,
        max_bytes: int,
        *,
        policy: str | Policy = DEFAULT_POLICY,
        on_evict: OnEvict | None = None,
        clock: Callable[[], float] = time.time,
        namespace: str | None = None,
    ) -> None:
        super().__init__(max_bytes, clock=clock, namespace=namespace)
        if isinstance(policy, str):
            if policy not in POLICIES:
                raise ValueError(f"policy should be one of {', '.join(POLICIES)}, not {policy!r}")
            policy = POLICIES[policy].within(max_bytes)
        elif policy.max_bytes > max_bytes:
            raise ValueError(
                f"policy should be for at most {max_bytes} bytes, not {policy.max_bytes}"
            )
        self.policy = policy
        self.on_evict = on_evict
        self.overhead_bytes = _OVERHEAD_BYTES + policy.OVERHEAD_BYTES
        """The cost of an entry beside its value, and beside `Shares` if its key has a scope."""
        self._shares = Shares()
        self._entries: dict[str, tuple[bytes, float | None]] = {}

    def read(self, key: str) -> bytes | None:
        found = self._entries.get(key)
        if found is None:
            return None
        value, expires_at = found
        if expires_at is not None and expires_at <= self.clock():
            self._drop(key)
            self.usage.expirations += 1
            return None
        self.policy.access(key)
        if not self._shares.is_empty:
            self._shares.access(key)
        return value

    async def write(self, key: str, value: bytes, expires_at: float | None) -> bool:
        self._drop(key)
        cost = self._cost(key, value)
        if cost > self.policy.max_bytes:
            self.usage.refused += 1
            return False
        self._entries[key] = (value, expires_at)
        self.policy.insert(key, cost)
        self._shares.insert(key, cost)
        self.usage.bytes += cost
        self.usage.entries += 1
        while self.usage.bytes > self.policy.max_bytes:
            self._evict()
        return key in self._entries

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

    def peek(self, key: str) -> tuple[bytes, float | None] | None:
        found = self._entries.get(key)
        alive = found is not None and (found[1] is None or found[1] > self.clock())
        return found if alive else None

    def victim(self, value_bytes: int) -> str | None:
        share_bytes = 0 if self._shares.is_empty else Shares.OVERHEAD_BYTES
        cost = value_bytes + self.overhead_bytes + share_bytes
        if self.usage.bytes + cost <= self.policy.max_bytes:
            return None
        victim = self.policy.victim()
        return self._shares.instead_of(victim) or victim

    def entries(self) -> Iterator[tuple[str, bytes, float | None]]:
        return iter([(key, *entry) for key, entry in self._entries.items()])

    def _evict(self) -> None:
        victim = None if self._shares.is_empty else self.policy.victim()
        key = self._shares.instead_of(victim)
        if key is None:
            key = self.policy.evict()
        else:
            self.policy.remove(key)
        value, expires_at = self._forget(key)
        self.usage.evictions += 1
        expired = expires_at is not None and expires_at <= self.clock()
        if self.on_evict is not None and not expired:
            self.on_evict(key, value, expires_at)

    def _drop(self, key: str) -> bool:
        if key not in self._entries:
            return False
        self.policy.remove(key)
        self._forget(key)
        return True

    def _forget(self, key: str) -> tuple[bytes, float | None]:
        entry = self._entries.pop(key)
        cost = self._cost(key, entry[0])
        self._shares.remove(key, cost)
        self.usage.bytes -= cost
        self.usage.entries -= 1
        return entry

    def _cost(self, key: str, value: bytes) -> int:
        share_bytes = Shares.OVERHEAD_BYTES if scope_of(key) else 0
        return len(value) + self.overhead_bytes + share_bytes
