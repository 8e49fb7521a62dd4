"""ARC, counted in bytes: recency and frequency share the cache as their evicted keys return."""

from collections import OrderedDict

from tiers.policies.base import Policy

_FIRST_SHARE = 0.5


class ARC(Policy):
    """Entries asked for once and entries asked for again each leave in order of recency.

    The keys that each of the two lists evicts are remembered for a while, as ghosts. When a ghost
    returns, its list was too short: the share of the cache that the once-list may take grows or
    shrinks by the size of what returned, and by more when the other list's ghosts are many
    (Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003). So the
    policy nears LRU on traffic without lasting favourites and resists scans on other traffic,
    with nothing to set. Sizes in bytes take the place of the paper's page counts, and the share
    starts in the middle instead of at nought, so that either kind of traffic is learned soon.

    Invariants: once-list and its ghosts cost at most `max_bytes`; all four lists twice that.
    """

    NAME = "arc"
    OVERHEAD_BYTES = 510

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._once: OrderedDict[str, int] = OrderedDict()
        self._again: OrderedDict[str, int] = OrderedDict()
        self._once_bytes = self._again_bytes = 0
        # By hash, which takes a quarter of the key's room; alike hashes only blur what is learned.
        self._once_ghosts: OrderedDict[int, int] = OrderedDict()
        self._again_ghosts: OrderedDict[int, int] = OrderedDict()
        self._once_ghosts_bytes = self._again_ghosts_bytes = 0
        self._once_target = _FIRST_SHARE * max_bytes

    def insert(self, key: str, size: int) -> None:
        ghost = hash(key)
        if (ghost_bytes := self._once_ghosts.pop(ghost, None)) is not None:
            step = size * max(1, self._again_ghosts_bytes / self._once_ghosts_bytes)
            self._once_target = min(self._once_target + step, self.max_bytes)
            self._once_ghosts_bytes -= ghost_bytes
        elif (ghost_bytes := self._again_ghosts.pop(ghost, None)) is not None:
            step = size * max(1, self._once_ghosts_bytes / self._again_ghosts_bytes)
            self._once_target = max(self._once_target - step, 0)
            self._again_ghosts_bytes -= ghost_bytes
        else:
            self._once[key] = size
            self._once_bytes += size
            return
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
            self._once_ghosts[hash(key)] = size
            self._once_ghosts_bytes += size
        else:
            key, size = self._again.popitem(last=False)
            self._again_bytes -= size
            self._again_ghosts[hash(key)] = size
            self._again_ghosts_bytes += size
        self._forget_ghosts()
        return key

    def _once_leaves(self) -> bool:
        return not self._again or (bool(self._once) and self._once_bytes > self._once_target)

    def _forget_ghosts(self) -> None:
        while self._once_ghosts and self._once_bytes + self._once_ghosts_bytes > self.max_bytes:
            self._once_ghosts_bytes -= self._once_ghosts.popitem(last=False)[1]
        in_bytes = self._once_bytes + self._again_bytes
        ghosts_most = 2 * self.max_bytes - in_bytes - self._once_ghosts_bytes
        while self._again_ghosts_bytes > ghosts_most and self._again_ghosts:
            self._again_ghosts_bytes -= self._again_ghosts.popitem(last=False)[1]
