"""ARC, counted in bytes: recency and frequency share the cache as their evicted keys return."""

from collections import OrderedDict

from tiers.policies.base import Policy
from tiers.policies.ghosts import Ghosts

_RECENT, _FREQUENT = 0, 1
_FIRST_SHARE = 0.5
_GHOSTS = 2


class ARC(Policy):
    """Two LRU lists: the recent one holds keys requested once, the frequent one all others.

    The keys that each list evicts are remembered for a while as ghosts. A ghost that returns shows
    that its list was too short: the recent list's target grows or shrinks by the size of the entry
    that returned, and by more if the other list has more ghosts (Megiddo and Modha, "ARC: A
    Self-Tuning, Low Overhead Replacement Cache", FAST 2003). So the policy nears LRU where there
    are no lasting favourites and resists scans elsewhere, with nothing to set.

    It differs from the paper in three points. Sizes in bytes replace page counts. The recent
    list's target starts at half the cache instead of zero, so that either kind of traffic is
    learned soon. There are twice as many ghosts, since a table of them is cheap and large caches
    have more hits with it.

    Invariants, `c` being `_GHOSTS * max_bytes`: the recent list and its ghosts cost at most c; both
    lists and all ghosts at most twice that.
    """

    NAME = "arc"
    OVERHEAD_BYTES = 190
    FIXED_SHARE = Ghosts.SHARE

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._recent: OrderedDict[str, int] = OrderedDict()
        self._frequent: OrderedDict[str, int] = OrderedDict()
        self._recent_bytes = self._frequent_bytes = 0
        self._ghosts = Ghosts(max_bytes)
        self._recent_target = _FIRST_SHARE * max_bytes

    def resize(self, max_bytes: int) -> None:
        self._ghosts = Ghosts(max_bytes)
        self._recent_target *= max_bytes / self.max_bytes
        super().resize(max_bytes)

    def insert(self, key: str, size: int) -> None:
        recent_ghosts, frequent_ghosts = spans = self._ghost_bytes()
        evicted_by = self._ghosts.pop(key, spans)
        if evicted_by is None:
            self._recent[key] = size
            self._recent_bytes += size
            return
        if evicted_by == _RECENT:
            step = size * max(1, frequent_ghosts / recent_ghosts)
            self._recent_target = min(self._recent_target + step, self.max_bytes)
        else:
            step = size * max(1, recent_ghosts / frequent_ghosts)
            self._recent_target = max(self._recent_target - step, 0)
        self._frequent[key] = size
        self._frequent_bytes += size

    def access(self, key: str) -> None:
        if key in self._frequent:
            self._frequent.move_to_end(key)
            return
        size = self._frequent[key] = self._recent.pop(key)
        self._recent_bytes -= size
        self._frequent_bytes += size

    def remove(self, key: str) -> None:
        if (size := self._recent.pop(key, None)) is not None:
            self._recent_bytes -= size
        else:
            self._frequent_bytes -= self._frequent.pop(key)

    def victim(self) -> str | None:
        return next(iter(self._recent if self._evicts_recent() else self._frequent), None)

    def evict(self) -> str:
        if self._evicts_recent():
            key, size = self._recent.popitem(last=False)
            self._recent_bytes -= size
            evicted_by = _RECENT
        else:
            key, size = self._frequent.popitem(last=False)
            self._frequent_bytes -= size
            evicted_by = _FREQUENT
        self._ghosts.add(key, evicted_by, size, self._ghost_bytes())
        return key

    def _evicts_recent(self) -> bool:
        is_over = bool(self._recent) and self._recent_bytes > self._recent_target
        return is_over or not self._frequent

    def _ghost_bytes(self) -> tuple[int, int]:
        """Return how many bytes of ghosts each list has, at least 1."""
        most = _GHOSTS * self.max_bytes
        recent_evicted, frequent_evicted = self._ghosts.evicted_bytes
        recent = min(recent_evicted, most - self._recent_bytes)
        in_lists = self._recent_bytes + self._frequent_bytes
        frequent = min(frequent_evicted, 2 * most - in_lists - recent)
        return max(1, recent), max(1, frequent)
