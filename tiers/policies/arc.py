"""ARC, counted in bytes: recency and frequency share the cache as their evicted keys return."""

from collections import OrderedDict

from tiers.policies.base import Policy
from tiers.policies.ghosts import Ghosts

_ONCE, _AGAIN = 0, 1
_FIRST_SHARE = 0.5
_GHOSTS = 2


class ARC(Policy):
    """Entries asked for once and entries asked for again each leave in order of recency.

    The keys that each of the two lists evicts are remembered for a while, as ghosts. When a ghost
    returns, its list was too short: the share of the cache that the once-list may take grows or
    shrinks by the size of what returned, and by more when the other list's ghosts are many
    (Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003). So the
    policy nears LRU on traffic without lasting favourites and resists scans on other traffic,
    with nothing to set.

    Not as in the paper: sizes in bytes take the place of page counts; the share starts in the
    middle instead of at nought, so that either kind of traffic is learned soon; and the ghosts
    are twice as many, since a table of them is cheap and large caches find more with it.

    Invariants, `c` being `_GHOSTS * max_bytes`: the once-list and its ghosts cost at most c; both
    lists and all ghosts at most twice that.
    """

    NAME = "arc"
    OVERHEAD_BYTES = 190
    FIXED_SHARE = Ghosts.SHARE

    def __init__(self, max_bytes: int, max_ghosts: int | None = None) -> None:
        super().__init__(max_bytes)
        self._once: OrderedDict[str, int] = OrderedDict()
        self._again: OrderedDict[str, int] = OrderedDict()
        self._once_bytes = self._again_bytes = 0
        self._ghosts = Ghosts(max_bytes, max_ghosts)
        self._once_target = _FIRST_SHARE * max_bytes

    def insert(self, key: str, size: int) -> None:
        once_ghosts, again_ghosts = spans = self._ghost_bytes()
        evicted_by = self._ghosts.take(key, spans)
        if evicted_by is None:
            self._once[key] = size
            self._once_bytes += size
            return
        if evicted_by == _ONCE:
            step = size * max(1, again_ghosts / once_ghosts)
            self._once_target = min(self._once_target + step, self.max_bytes)
        else:
            step = size * max(1, once_ghosts / again_ghosts)
            self._once_target = max(self._once_target - step, 0)
        self._again[key] = size
        self._again_bytes += size

    def access(self, key: str) -> None:
        if key in self._again:
            self._again.move_to_end(key)
            return
        size = self._again[key] = self._once.pop(key)
        self._once_bytes -= size
        self._again_bytes += size

    def remove(self, key: str) -> None:
        if (size := self._once.pop(key, None)) is not None:
            self._once_bytes -= size
        else:
            self._again_bytes -= self._again.pop(key)

    def victim(self) -> str | None:
        return next(iter(self._once if self._once_leaves() else self._again), None)

    def evict(self) -> str:
        if self._once_leaves():
            key, size = self._once.popitem(last=False)
            self._once_bytes -= size
            which = _ONCE
        else:
            key, size = self._again.popitem(last=False)
            self._again_bytes -= size
            which = _AGAIN
        self._ghosts.add(key, which, size, self._ghost_bytes())
        return key

    def _once_leaves(self) -> bool:
        return not self._again or (bool(self._once) and self._once_bytes > self._once_target)

    def _ghost_bytes(self) -> tuple[int, int]:
        """Return how many bytes of ghosts there are of either list, at least 1."""
        most = _GHOSTS * self.max_bytes
        once_evicted, again_evicted = self._ghosts.evicted_bytes
        once = min(once_evicted, most - self._once_bytes)
        again = min(again_evicted, 2 * most - self._once_bytes - self._again_bytes - once)
        return max(1, once), max(1, again)
