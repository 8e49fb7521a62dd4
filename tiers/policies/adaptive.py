"""ARC, which yields to LRU in a small cache where that finds more."""

from itertools import count

from tiers.policies.arc import ARC
from tiers.policies.base import Policy
from tiers.policies.lru import LRU

_FEW = 64
# A lead as small may be chance.
_LEAD = 3


class Adaptive(ARC):
    """ARC, but that the least recently used leaves while few entries are in and LRU is ahead.

    ARC learns from ghosts that return. In a cache of a handful of entries hardly any do, and what
    is learned is chance: on some traffic such a cache does better to learn nothing. So, until it
    has held more than `_FEW` entries, it keeps count of what ARC and LRU would each have found,
    as caches do for which two policies duel (Qureshi et al., "Adaptive Insertion Policies for High
    Performance Caching", ISCA 2007). Larger ones lose by changing sides what they win by it.
    """

    NAME = "adaptive"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._arc = _Rehearsal(ARC(max_bytes, max_ghosts=16 * _FEW))
        self._lru = _Rehearsal(LRU(max_bytes))
        self._arc_lead = 0
        self._is_small = True
        self._turns = count()
        self._asked_at: dict[str, int] = {}

    def insert(self, key: str, size: int) -> None:
        if self._is_small:
            self._note(key, size)
        super().insert(key, size)

    def access(self, key: str) -> None:
        if self._is_small:
            self._note(key, self._once[key] if key in self._once else self._again[key])
        super().access(key)

    def remove(self, key: str) -> None:
        if self._is_small:
            del self._asked_at[key]
            self._arc.drop(key)
            self._lru.drop(key)
        super().remove(key)

    def evict(self) -> str:
        key = super().evict()
        if self._is_small:
            del self._asked_at[key]
        return key

    def _once_leaves(self) -> bool:
        if self._is_small and self._arc_lead <= _LEAD and self._once and self._again:
            asked_at = self._asked_at
            return asked_at[next(iter(self._once))] < asked_at[next(iter(self._again))]
        return super()._once_leaves()

    def _note(self, key: str, size: int) -> None:
        self._arc_lead += self._arc.finds(key, size) - self._lru.finds(key, size)
        self._asked_at[key] = next(self._turns)
        if len(self._asked_at) > _FEW:
            self._is_small = False
            self._asked_at.clear()
            del self._arc, self._lru


class _Rehearsal:
    """What a policy would hold, were it asked alone."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._held: dict[str, int] = {}
        self._bytes = 0

    def finds(self, key: str, size: int) -> bool:
        """Ask for a key, which is let in if it isn't there."""
        if key in self._held:
            self._policy.access(key)
            return True
        self._policy.insert(key, size)
        self._held[key] = size
        self._bytes += size
        while self._bytes > self._policy.max_bytes:
            self._bytes -= self._held.pop(self._policy.evict())
        return False

    def drop(self, key: str) -> None:
        """Forget a key, whether it is there or not."""
        if (size := self._held.pop(key, None)) is not None:
            self._policy.remove(key)
            self._bytes -= size
