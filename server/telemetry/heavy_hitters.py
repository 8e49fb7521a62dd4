"""Heavy hitters: the most frequent items of an endless stream, counted in constant memory.

Space-Saving (Metwally, Agrawal and El Abbadi, «Efficient Computation of Frequent and Top-k Elements
in Data Streams», 2005): an item without a counter replaces the one with the least count, and takes
over its count, as a possible excess. So with k counters after n additions no count is too low, none
is too high by more than n/k, and each item that came more often than that has a counter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heappush, heapreplace
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


@dataclass(slots=True)
class Counter(Generic[_Value]):
    """The count of an item, and a value that belongs to it."""

    count: float
    excess: float
    """By how much the count may be too high."""
    value: _Value

    @property
    def least(self) -> float:
        """A lower bound of how often it came."""
        return self.count - self.excess


class HeavyHitters(Generic[_Value]):
    """Counters of items, which are numbers; at most `capacity` counters.

    Args:
        capacity: above 0.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._counters: dict[int, Counter[_Value]] = {}
        # One entry for each counter, with a past count of it: the count may have grown since.
        self._heap: list[tuple[float, int]] = []

    def add(self, key: int, new: _Value) -> _Value:
        """Count `key` once more; return its value, which is `new` if it had no counter."""
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
        """All counters by item."""
        return self._counters

    def scale(self, factor: float) -> None:
        """Multiply all counts by a factor between 0 and 1, so that earlier additions count less."""
        for counter in self._counters.values():
            counter.count *= factor
            counter.excess *= factor
        self._heap = [(count * factor, key) for count, key in self._heap]

    def _least(self) -> tuple[float, int]:
        """Return the least count and its item."""
        heap = self._heap
        while True:
            count, key = heap[0]
            now = self._counters[key].count
            if now == count:
                return heap[0]
            heapreplace(heap, (now, key))
