"""Least frequently used, with dynamic aging."""

from collections import OrderedDict, defaultdict

from tiers.policies.base import Policy

_MOST = 255
"""The highest count: ranks stay within 255 of the age, so the lowest is found soon."""


class LFU(Policy):
    """The entry with the lowest rank leaves; among equals, the least recently requested.

    A rank is the entry's count of requests plus the age of the cache at its last request; the age
    is the rank of the entry evicted last. So what is popular now catches up with what was popular
    once (LFU with dynamic aging: Arlitt et al., "Evaluating Content Management Techniques for Web
    Proxy Caches", 2000).
    """

    NAME = "lfu"
    OVERHEAD_BYTES = 330

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._age = 0
        self._counts: dict[str, int] = {}
        self._ranks: dict[str, int] = {}
        self._by_rank: defaultdict[int, OrderedDict[str, None]] = defaultdict(OrderedDict)

    def insert(self, key: str, size: int) -> None:
        self._counts[key] = 1
        self._place(key, self._age + 1)

    def access(self, key: str) -> None:
        count = min(self._counts[key] + 1, _MOST)
        self._detach(key)
        self._counts[key] = count
        self._place(key, self._age + count)

    def remove(self, key: str) -> None:
        self._detach(key)
        del self._counts[key]

    def victim(self) -> str | None:
        if not self._ranks:
            return None
        # No rank is below the age: the entry evicted last had the lowest, and ranks only grow.
        rank = self._age
        while rank not in self._by_rank:
            rank += 1
        return next(iter(self._by_rank[rank]))

    def evict(self) -> str:
        key = self.victim()
        if key is None:
            raise KeyError("the policy is empty")
        self._age = self._ranks[key]
        self.remove(key)
        return key

    def _place(self, key: str, rank: int) -> None:
        self._ranks[key] = rank
        self._by_rank[rank][key] = None

    def _detach(self, key: str) -> None:
        rank = self._ranks.pop(key)
        peers = self._by_rank[rank]
        del peers[key]
        if not peers:
            del self._by_rank[rank]
