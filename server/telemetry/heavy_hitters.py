"""Heavy hitters: the most frequent items of an endless stream, counted in constant memory.

Space-Saving (Metwally, Agrawal and El Abbadi, «Efficient Computation of Frequent and Top-k Elements
in Data Streams», 2005): an item without a counter replaces the one with the least count, and takes
over its count, as a possible excess. So with k counters after n additions no count is too low, none
is too high by more than n/k, and each item that came more often than that has a counter.

The counters of several streams merge, and keep these bounds for all streams together (Agarwal et
al., «Mergeable Summaries», 2012): an item that one of them has no counter for may have come there
as often as the least that is counted there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappush, heapreplace, nlargest
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

    def merge(
        self,
        others: Mapping[int, Counter[_Value]],
        merge_values: Callable[[_Value, _Value], _Value],
    ) -> None:
        """Add the counters of another stream, which had as much room.

        Args:
            others: its counters by item; they become ours.
            merge_values: returns the value of an item that both count, of ours and of theirs.
        """
        ours, room = self._counters, self._capacity
        our_least = self._least()[0] if len(ours) >= room else 0.0
        their_least = min(each.count for each in others.values()) if len(others) >= room else 0.0
        for key, counter in ours.items():
            if key not in others:
                counter.count += their_least
                counter.excess += their_least
        for key, counter in others.items():
            if (own := ours.get(key)) is None:
                counter.count += our_least
                counter.excess += our_least
                ours[key] = counter
            else:
                own.count += counter.count
                own.excess += counter.excess
                own.value = merge_values(own.value, counter.value)
        most = nlargest(room, ours.items(), key=lambda item: item[1].count)
        self._counters = dict(most)
        self._heap = [(counter.count, key) for key, counter in most]
        heapify(self._heap)

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
