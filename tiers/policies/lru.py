"""Least recently used."""

from collections import OrderedDict

from tiers.policies.base import Policy


class LRU(Policy):
    """The entry whose last request is longest ago leaves."""

    NAME = "lru"
    OVERHEAD_BYTES = 150

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._order: OrderedDict[str, None] = OrderedDict()

    def insert(self, key: str, size: int) -> None:
        self._order[key] = None

    def access(self, key: str) -> None:
        self._order.move_to_end(key)

    def remove(self, key: str) -> None:
        del self._order[key]

    def victim(self) -> str | None:
        return next(iter(self._order), None)

    def evict(self) -> str:
        return self._order.popitem(last=False)[0]
