"""SIEVE: a queue in which a hand looks for entries that were not requested again."""

from collections import OrderedDict

from tiers.policies.base import Policy


class SIEVE(Policy):
    """The first entry that was not requested since the hand last passed it leaves.

    The hand moves from the oldest entry to the newest and then starts over. It stays where it
    evicted, and entries that it passes keep their places (Zhang et al., "SIEVE is Simpler than
    LRU", NSDI 2024).
    """

    NAME = "sieve"
    OVERHEAD_BYTES = 230

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        # The hand divides the queue into the part it has passed and the part ahead of it. The
        # newest entry is kept apart, since the paper makes room before it inserts.
        self._passed: OrderedDict[str, None] = OrderedDict()
        self._ahead: OrderedDict[str, None] = OrderedDict()
        self._newest: str | None = None
        self._visited: set[str] = set()

    def insert(self, key: str, size: int) -> None:
        if self._newest is not None:
            self._ahead[self._newest] = None
        self._newest = key

    def access(self, key: str) -> None:
        self._visited.add(key)

    def remove(self, key: str) -> None:
        self._visited.discard(key)
        if key == self._newest:
            self._newest = None
            return
        del (self._ahead if key in self._ahead else self._passed)[key]
        self._start_over_at_the_end()

    def victim(self) -> str | None:
        while self._ahead:
            key = next(iter(self._ahead))
            if key not in self._visited:
                return key
            self._visited.remove(key)
            self._passed[key] = self._ahead.pop(key)
            self._start_over_at_the_end()
        return self._newest

    def evict(self) -> str:
        key = self.victim()
        if key is None:
            raise KeyError("the policy is empty")
        self.remove(key)
        return key

    def _start_over_at_the_end(self) -> None:
        if not self._ahead:
            self._ahead, self._passed = self._passed, self._ahead
