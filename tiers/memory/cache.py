"""The memory tier's backend: entries in this process, bounded in bytes; a policy evicts.

Owns the entries. An entry is kept decoded from its first use on, and encoded anew where its bytes
are asked for. Invariants: `usage.bytes` is the sum of the entries' costs and, with the policy's
fixed memory, never exceeds `max_bytes` after a call, but for a moment after that was lowered; the
policy knows exactly the keys of the entries.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tiers.backend import ByteCache
from tiers.entry import Entry
from tiers.key import scope_of
from tiers.memory.shares import Shares
from tiers.policies import DEFAULT_POLICY, POLICIES, Policy

_OVERHEAD_BYTES = sys.getsizeof("k" * 64) + sys.getsizeof(b"") + sys.getsizeof((0, 0)) + 24 + 440
"""Key, object headers, expiry, a share of the dictionary, and the objects of a decoded entry; all
without the policy's overhead."""

# What the event loop gives at a time to evict what a lower limit leaves no room for.
_SLICE_S = 0.001


class _Held:
    """A value, encoded or decoded, and its expiry."""

    __slots__ = ("bytes", "encoded", "entry", "expires_at")

    def __init__(self, value: bytes, expires_at: float | None) -> None:
        self.encoded: bytes | None = value
        self.entry: Entry | None = None
        self.bytes, self.expires_at = len(value), expires_at

    def decode(self) -> Entry:
        """Return the entry; raises `ValueError` if the value is none."""
        if (entry := self.entry) is None:
            entry = self.entry = Entry.decode(self.encode())
            self.encoded = None
        return entry

    def encode(self) -> bytes:
        """Return the value's bytes."""
        return self.entry.encode() if self.entry is not None else self.encoded or b""


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
        self._entries: dict[str, _Held] = {}
        # Above the policy's while entries leave for a lower limit.
        self._limit_bytes = policy.max_bytes

    def resize(self, max_bytes: int) -> None:
        """Hold at most `max_bytes` from now on; needs an event loop.

        What is too much leaves in the next turns of the event loop, a millisecond in each.

        Raises:
            OSError: the policy has no memory for so many; nothing has changed.
        """
        self.policy.resize(self.policy.bytes_within(max_bytes))
        self.max_bytes = max_bytes
        self._limit_bytes = max(self.policy.max_bytes, self.usage.bytes)
        self._shrink()

    def read(self, key: str) -> bytes | None:
        held = self._read(key)
        return None if held is None else held.encode()

    def read_entry(self, key: str) -> Entry | None:
        held = self._read(key)
        return None if held is None else held.decode()

    def peek_entry(self, key: str, now: float) -> Entry | None:
        held = self._entries.get(key)
        if held is None or (held.expires_at is not None and held.expires_at <= now):
            return None
        # A hit pays for each call.
        return held.entry or held.decode()

    def note_read(self, key: str) -> None:
        self.policy.access(key)
        if not self._shares.is_empty:
            self._shares.access(key)

    async def write(self, key: str, value: bytes, expires_at: float | None) -> bool:
        self._drop(key)
        cost = self._cost(key, len(value))
        if cost > self.policy.max_bytes:
            self.usage.refused += 1
            return False
        self._entries[key] = _Held(value, expires_at)
        self.policy.insert(key, cost)
        self._shares.insert(key, cost)
        self.usage.bytes += cost
        self.usage.entries += 1
        while self.usage.bytes > self._limit_bytes:
            self._evict()
        return key in self._entries

    async def touch(self, key: str, expires_at: float | None) -> bool:
        held = self._read(key)
        if held is not None:
            held.expires_at = expires_at
        return held is not None

    async def remove(self, key: str) -> bool:
        return self._drop(key)

    def keys(self) -> Iterable[str]:
        return list(self._entries)

    def peek(self, key: str) -> tuple[bytes, float | None] | None:
        held = self._entries.get(key)
        if held is None or (held.expires_at is not None and held.expires_at <= self.clock()):
            return None
        return held.encode(), held.expires_at

    def victim(self, value_bytes: int) -> str | None:
        share_bytes = 0 if self._shares.is_empty else Shares.OVERHEAD_BYTES
        cost = value_bytes + self.overhead_bytes + share_bytes
        if self.usage.bytes + cost <= self.policy.max_bytes:
            return None
        victim = self.policy.victim()
        return self._shares.instead_of(victim) or victim

    def entries(self) -> Iterator[tuple[str, bytes, float | None]]:
        # Some may leave while a caller iterates, so those that are held now are listed first.
        return ((key, held.encode(), held.expires_at) for key, held in [*self._entries.items()])

    def _read(self, key: str) -> _Held | None:
        held = self._entries.get(key)
        if held is None:
            return None
        if held.expires_at is not None and held.expires_at <= self.clock():
            self._drop(key)
            self.usage.expirations += 1
            return None
        self.note_read(key)
        return held

    def _shrink(self) -> None:
        until, limit_bytes = time.perf_counter() + _SLICE_S, self.policy.max_bytes
        while self.usage.bytes > limit_bytes and time.perf_counter() < until:
            self._evict()
        self._limit_bytes = max(limit_bytes, self.usage.bytes)
        if self._limit_bytes > limit_bytes:
            asyncio.get_running_loop().call_soon(self._shrink)

    def _evict(self) -> None:
        victim = None if self._shares.is_empty else self.policy.victim()
        key = self._shares.instead_of(victim)
        if key is None:
            key = self.policy.evict()
        else:
            self.policy.remove(key)
        held = self._forget(key)
        self.usage.evictions += 1
        expired = held.expires_at is not None and held.expires_at <= self.clock()
        if self.on_evict is not None and not expired:
            self.on_evict(key, held.encode(), held.expires_at)

    def _drop(self, key: str) -> bool:
        if key not in self._entries:
            return False
        self.policy.remove(key)
        self._forget(key)
        return True

    def _forget(self, key: str) -> _Held:
        held = self._entries.pop(key)
        cost = self._cost(key, held.bytes)
        self._shares.remove(key, cost)
        self.usage.bytes -= cost
        self.usage.entries -= 1
        return held

    def _cost(self, key: str, value_bytes: int) -> int:
        share_bytes = Shares.OVERHEAD_BYTES if scope_of(key) else 0
        return value_bytes + self.overhead_bytes + share_bytes
