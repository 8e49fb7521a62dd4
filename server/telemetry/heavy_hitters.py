"""Heavy hitters: what comes most often in an endless stream, counted in constant memory.

Space-Saving (Metwally, Agrawal and El Abbadi, «Efficient Computation of Frequent and Top-k Elements
in Data Streams», 2005): what isn't counted yet takes the place of what was counted least, and its
count, as what it may have too much. So with k counters after n additions no count is too low, none
too high by more than n/k, and whatever came more often than that is there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heappush, heapreplace
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


@dataclass(slots=True)
class Counter(Generic[_Value]):
    """How often something came, and what is known of it."""

    count: float
    excess: float
    """By how much the count may be too high."""
    value: _Value

    @property
    def least(self) -> float:
        """How often it came at least."""
        return self.count - self.excess


class HeavyHitters(Generic[_Value]):
    """Counters by number, at most `capacity` of them.

    Args:
        capacity: above 0.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._counters: dict[int, Counter[_Value]] = {}
        # One entry for each counter, with a count that it had once: the least may have grown since.
        self._heap: list[tuple[float, int]] = []

    def add(self, key: int, new: _Value) -> _Value:
        """Count `key` once more; return what is known of it: `new`, if it wasn't counted yet."""
        counter = self._counters.get(key)
        if counter is not None:
            counter.count += 1
            return counter.value
        if len(self._counters) < self._capacity:
            self._counters[key] = Counter(1, 0, new)
            heappush(self._heap, (1, key))
            return new
        excess, replaced = self._least()
        del self._counters[replaced]
        self._counters[key] = Counter(excess + 1, excess, new)
        heapreplace(self._heap, (excess + 1, key))
        return new

    @property
    def counters(self) -> Mapping[int, Counter[_Value]]:
        """All of them, by what they count."""
        return self._counters

    def scale(self, factor: float) -> None:
        """Multiply all counts, so that what came earlier counts less; above 0 and below 1."""
        for counter in self._counters.values():
            counter.count *= factor
            counter.excess *= factor
        self._heap = [(count * factor, key) for count, key in self._heap]

    def _least(self) -> tuple[float, int]:
        """Return the least count, and whose it is."""
        heap = self._heap
        while True:
            count, key = heap[0]
            now = self._counters[key].count
            if now == count:
                return heap[0]
            heapreplace(heap, (now, key))
