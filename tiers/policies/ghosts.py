"""Ghosts: the keys that the two lists of a cache evicted lately, in little, constant memory."""

import mmap

_SLOT_BYTES = 8
_CACHE_BYTES_PER_SLOT = 256
_WAYS = 4
_STAMPS = 1 << 32
# Fine enough to order a million evictions; repeats only after 4,096 times the cache is evicted.
_STAMPS_PER_CACHE = 1 << 20


class Ghosts:
    """Keys evicted by list 0 or 1, each until its list has evicted a given number of bytes more.

    A hash table with one slot for each 256 bytes of cache. A slot holds 31 bits of the key's hash,
    the list, and a stamp: how much the list had evicted by then. A key has a set of four slots; if
    all are taken, the ghost closest to being forgotten is overwritten. Collisions of hashes and
    overwritten ghosts only blur what a policy learns.
    """

    SHARE = _SLOT_BYTES / _CACHE_BYTES_PER_SLOT
    """The memory of the table, as a share of the cache."""

    def __init__(self, max_bytes: int) -> None:
        self._sets = max(1, max_bytes // _CACHE_BYTES_PER_SLOT // _WAYS)
        size = _SLOT_BYTES * _WAYS * self._sets
        # Zeros that the system gives page by page, once they are used.
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._slots = memoryview(pages).cast("Q")
        self._stamp_bytes = max(1, max_bytes // _STAMPS_PER_CACHE)
        self.evicted_bytes = [0, 0]
        """The bytes that each list has evicted since the cache was made."""

    def add(self, key: str, which: int, size: int, spans: tuple[int, int]) -> None:
        """Remember that list `which` evicts `key`, whose entry costs `size` bytes."""
        self.evicted_bytes[which] += size
        slots, (first, fingerprint) = self._slots, self._place(key)
        oldest, most = first, -1.0
        for slot in range(first, first + _WAYS):
            if not slots[slot]:
                oldest = slot
                break
            age = self._age_bytes(slots[slot]) / spans[_which(slots[slot])]
            if age > most:
                oldest, most = slot, age
        slots[oldest] = fingerprint << 33 | which << 32 | self._stamp(which)

    def pop(self, key: str, spans: tuple[int, int]) -> int | None:
        """Forget `key`. Returns the list that evicted it, or `None` if that is too long ago.

        `spans` are the bytes, at least 1, that each list evicts until it forgets a ghost.
        """
        slots, (first, fingerprint) = self._slots, self._place(key)
        for slot in range(first, first + _WAYS):
            ghost = slots[slot]
            if ghost and ghost >> 33 == fingerprint:
                slots[slot] = 0
                which = _which(ghost)
                return which if self._age_bytes(ghost) <= spans[which] else None
        return None

    def _place(self, key: str) -> tuple[int, int]:
        """Return the first slot of the key's set, and the bits of its hash that a slot holds."""
        hashed = hash(key)
        return hashed % self._sets * _WAYS, hashed >> 32 & 0x7FFFFFFF

    def _stamp(self, which: int) -> int:
        return self.evicted_bytes[which] // self._stamp_bytes % _STAMPS

    def _age_bytes(self, ghost: int) -> int:
        """Return how many bytes the ghost's list has evicted since."""
        return (self._stamp(_which(ghost)) - ghost) % _STAMPS * self._stamp_bytes


def _which(ghost: int) -> int:
    return ghost >> 32 & 1
