"""S3-FIFO: a small queue that filters what enters the main one, and ghosts of what it evicted."""

from collections import OrderedDict

from tiers.policies.base import Policy

_SMALL_SHARE = 0.1
_MOST = 3
# More are too many only after a resize, and needn't go at once.
_FORGOTTEN_AT_ONCE = 64


class S3FIFO(Policy):
    """Entries that are requested only once leave early; the others circulate in a main queue.

    Three FIFO queues. New entries enter the small queue, a tenth of the cache. Entries requested
    more than once there move to the main queue; the others are evicted, and the ghost queue
    remembers their keys. A key that returns while it is a ghost enters the main queue at once. An
    entry of the main queue is reinserted once for each request, at most three times (Yang et al.,
    "FIFO Queues are All You Need for Cache Eviction", SOSP 2023).
    """

    NAME = "s3fifo"
    OVERHEAD_BYTES = 390

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._small: OrderedDict[str, int] = OrderedDict()
        self._main: OrderedDict[str, int] = OrderedDict()
        self._ghosts: OrderedDict[int, int] = OrderedDict()
        self._small_bytes = 0
        self._ghosts_bytes = 0
        self._small_target = _SMALL_SHARE * max_bytes
        self._counts: dict[str, int] = {}

    def resize(self, max_bytes: int) -> None:
        self._small_target = _SMALL_SHARE * max_bytes
        super().resize(max_bytes)

    def insert(self, key: str, size: int) -> None:
        self._counts[key] = 0
        remembered = self._ghosts.pop(hash(key), None)
        if remembered is None:
            self._small[key] = size
            self._small_bytes += size
        else:
            self._ghosts_bytes -= remembered
            self._main[key] = size

    def access(self, key: str) -> None:
        count = self._counts[key]
        if count < _MOST:
            self._counts[key] = count + 1

    def remove(self, key: str) -> None:
        del self._counts[key]
        if self._main.pop(key, None) is None:
            self._small_bytes -= self._small.pop(key)

    def victim(self) -> str | None:
        while self._counts:
            if self._small and (self._small_bytes > self._small_target or not self._main):
                key, size = next(iter(self._small.items()))
                if self._counts[key] <= 1:
                    return key
                self._small_bytes -= self._small.pop(key)
                self._main[key] = size
                self._counts[key] = 0
            else:
                key = next(iter(self._main))
                if self._counts[key] == 0:
                    return key
                self._counts[key] -= 1
                self._main.move_to_end(key)
        return None

    def evict(self) -> str:
        key = self.victim()
        if key is None:
            raise KeyError("the policy is empty")
        if (size := self._small.get(key)) is not None:
            self._remember(key, size)
        self.remove(key)
        return key

    def _remember(self, key: str, size: int) -> None:
        # A hash takes a quarter of the key's memory; a collision only misplaces one entry.
        if (before := self._ghosts.pop(hash(key), None)) is not None:
            self._ghosts_bytes -= before
        self._ghosts[hash(key)] = size
        self._ghosts_bytes += size
        for _ in range(_FORGOTTEN_AT_ONCE):
            if self._ghosts_bytes <= self.max_bytes - self._small_target:
                break
            self._ghosts_bytes -= self._ghosts.popitem(last=False)[1]
