"""W-TinyLFU: a recency window in front of a main area that admits by frequency."""

from collections import OrderedDict
from math import copysign

from tiers.frequency import FrequencySketch
from tiers.policies.base import Policy

_WINDOW_SHARE = 0.01
_PROTECTED_SHARE = 0.8
_FIRST_CAPACITY = 256
_SAMPLE_FACTOR = 10
_STEP_SHARE = 0.0625
_STEP_DECAY = 0.98
_RESTART_CHANGE = 0.05
# More are too many only after a resize, and needn't move at once.
_MOVED_AT_ONCE = 64


class WTinyLFU(Policy):
    """An entry that leaves the window stays only if it is requested more often than its rival.

    The window is an LRU list. The main area is a segmented LRU list, whose protected part holds
    entries that were requested while on probation. Hill climbing sets the window's share: after
    each sample it moves on in the same direction if the hit ratio rose and turns round if it fell,
    by steps that decay, and that start anew when the ratio jumps (Einziger et al., "TinyLFU", 2017,
    and "Adaptive Software Cache Management", 2018; the constants are Caffeine's).
    """

    NAME = "wtinylfu"
    OVERHEAD_BYTES = 260

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._window: OrderedDict[str, int] = OrderedDict()
        self._probation: OrderedDict[str, int] = OrderedDict()
        self._protected: OrderedDict[str, int] = OrderedDict()
        self._window_bytes = self._probation_bytes = self._protected_bytes = 0
        self._window_target = _WINDOW_SHARE * max_bytes
        self._sketch = FrequencySketch(_FIRST_CAPACITY)
        self._step = _STEP_SHARE * max_bytes
        self._hits = self._requests = 0
        self._hit_ratio: float | None = None

    def resize(self, max_bytes: int) -> None:
        self._window_target *= max_bytes / self.max_bytes
        self._step *= max_bytes / self.max_bytes
        super().resize(max_bytes)

    def insert(self, key: str, size: int) -> None:
        self._record(key, hit=0)
        self._window[key] = size
        self._window_bytes += size
        if len(self._window) + len(self._probation) + len(self._protected) > self._sketch.capacity:
            self._sketch.double()

    def access(self, key: str) -> None:
        self._record(key, hit=1)
        if key in self._protected:
            self._protected.move_to_end(key)
        elif key in self._window:
            self._window.move_to_end(key)
        else:
            self._protect(key)

    def remove(self, key: str) -> None:
        if (size := self._window.pop(key, None)) is not None:
            self._window_bytes -= size
        elif (size := self._probation.pop(key, None)) is not None:
            self._probation_bytes -= size
        else:
            self._protected_bytes -= self._protected.pop(key)

    def victim(self) -> str | None:
        while True:
            rival = next(iter(self._probation or self._protected), None)
            overflows = self._window_bytes > self._window_target
            if not self._window or (rival is not None and not overflows):
                return rival
            candidate, size = next(iter(self._window.items()))
            main_target = self.max_bytes - self._window_target
            if not overflows or size > main_target:
                return candidate
            if self._probation_bytes + self._protected_bytes + size > main_target:
                return rival if self._beats(candidate, rival) else candidate
            self._window_bytes -= self._window.pop(candidate)
            self._probation[candidate] = size
            self._probation_bytes += size

    def evict(self) -> str:
        key = self.victim()
        if key is None:
            raise KeyError("the policy is empty")
        self.remove(key)
        return key

    def _beats(self, candidate: str, rival: str | None) -> bool:
        # Without a rival the main area is empty, and the candidate has room there.
        return rival is not None and self._sketch.estimate(candidate) > self._sketch.estimate(rival)

    def _protect(self, key: str) -> None:
        size = self._protected[key] = self._probation.pop(key)
        self._probation_bytes -= size
        self._protected_bytes += size
        most = _PROTECTED_SHARE * (self.max_bytes - self._window_target)
        for _ in range(_MOVED_AT_ONCE):
            if self._protected_bytes <= most:
                break
            key, size = self._protected.popitem(last=False)
            self._protected_bytes -= size
            self._probation[key] = size
            self._probation_bytes += size

    def _record(self, key: str, hit: int) -> None:
        self._sketch.record(key)
        self._hits += hit
        self._requests += 1
        if self._requests >= _SAMPLE_FACTOR * self._sketch.capacity:
            self._climb()

    def _climb(self) -> None:
        ratio = self._hits / self._requests
        self._hits = self._requests = 0
        if self._hit_ratio is not None:
            change = ratio - self._hit_ratio
            step = self._step if change >= 0 else -self._step
            least, most = _WINDOW_SHARE * self.max_bytes, self.max_bytes
            target = self._window_target + step
            self._window_target = min(max(target, least), most)
            if abs(change) >= _RESTART_CHANGE:
                step = copysign(_STEP_SHARE * self.max_bytes, step)
            # At either end the direction turns, or a steady ratio would hold the window there.
            self._step = _STEP_DECAY * (step if least <= target <= most else -step)
        self._hit_ratio = ratio
