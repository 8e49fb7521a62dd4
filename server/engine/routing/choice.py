"""In which order upstreams are tried for a request: pure, without clocks and without I/O.

`prefix` keeps prompts that begin alike together, so that an engine finds the beginning in its own
prefix cache. Rendezvous hashing (Thaler and Ravishankar, 1998) of a beginning gives an order of the
upstreams. It needs no memory of prompts, every process finds the same order, and an upstream that
leaves moves its own share alone.

A beginning that all prompts have must not lead all of them to one engine, and the growing beginning
of a conversation must not lead each turn to another. So the shortest beginning decides, unless it
is asked for more often than one engine can answer. Then it narrows the upstreams to as many as its
share of the requests needs, and the next longer beginning chooses among these.

An upstream above the bound of load is passed over for the next in the order (Mirrokni, Thorup and
Zadimoghaddam, «Consistent Hashing with Bounded Loads», 2016). The bound is a factor of the mean,
but at least a margin above it: otherwise chance alone would drive requests away. The margin is
wider for a long prompt, which would have to be computed anew elsewhere, now or the next time.
"""

import itertools
from collections.abc import Callable, Sequence
from hashlib import blake2b
from math import ceil
from typing import NamedTuple

from server.telemetry.heavy_hitters import HeavyHitters

SPREAD = 1.25
"""By which factor an upstream's load may be above the mean."""
MARGIN_TOKENS = 8192
"""By how many tokens it may be above the mean in any case; below a second of a GPU's work."""
PATIENCE = 6
"""So many times the tokens of its prompt an upstream may be further above the mean for a request.
More than once: what is computed elsewhere takes room there, too, and time from those behind it."""
_COUNTERS = 4096
# Counts are halved after so many requests, so that shares follow what is asked now.
_WINDOW = 4096
# The shares of fewer requests for each upstream are taken for chance.
_LEAST_WINDOW = 8


class Preference(NamedTuple):
    """The order of a model's upstreams for one request, by their numbers."""

    order: tuple[int, ...]
    group: int
    """How many of the first are as good as each other."""


class Choice(NamedTuple):
    """In which order upstreams are tried for a request, by their numbers."""

    order: Sequence[int]
    is_overflow: bool = False
    """Whether the first is none of those that its beginning prefers: they have too much to do."""


class Beginnings:
    """The beginnings of requests, as upstreams are chosen by them."""

    def __init__(self) -> None:
        self._counts: HeavyHitters[None] = HeavyHitters(_COUNTERS)
        self._requests = 0.0

    def prefer(self, beginnings: Sequence[int], names: Sequence[str]) -> Preference:
        """Return the order of upstreams for a request.

        Args:
            beginnings: of its prompt, shortest first; at least one. Each is a digest of 8 bytes as
                a number.
            names: of the upstreams, the same in all processes.
        """
        order = [*range(len(names))]
        group = len(order)
        for beginning in beginnings:
            order[:group] = sorted(order[:group], key=_scores(beginning, names))
            group = min(group, self._needed(beginning, len(names)))
            if group == 1:
                break
        return Preference(tuple(order), group)

    def count(self, beginnings: Sequence[int]) -> int:
        """Count a request; return how many of its beginnings came before."""
        if self._requests >= _WINDOW:
            self._requests /= 2
            self._counts.scale(0.5)
        self._requests += 1
        counters, seen = self._counts.counters, 0
        for number, beginning in enumerate(beginnings, 1):
            if beginning in counters:
                seen = number
            self._counts.add(beginning, None)
        return seen

    def _needed(self, beginning: int, upstreams: int) -> int:
        """Return how many of so many upstreams the requests with a beginning need."""
        counter = self._counts.counters.get(beginning)
        if counter is None:
            return 1
        requests = max(self._requests, _LEAST_WINDOW * upstreams)
        needed = max(1, ceil(SPREAD * upstreams * counter.least / requests))
        # The next power of two: it changes seldom, and each change moves longer beginnings.
        return 1 << (needed - 1).bit_length()


def _scores(beginning: int, names: Sequence[str]) -> Callable[[int], bytes]:
    key = beginning.to_bytes(8)
    return lambda number: blake2b(names[number].encode(), digest_size=8, key=key).digest()


class Rotation:
    """Whose turn it is among upstreams that are as good as each other."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def next(self, upstreams: Sequence[int]) -> list[int]:
        """Return the upstreams in turn: the first of this time is the last of the next."""
        at = next(self._turn) % max(len(upstreams), 1)
        return [*upstreams[at:], *upstreams[:at]]


def by_load(upstreams: Sequence[int], loads: Sequence[float]) -> list[int]:
    """Return upstreams with the least loaded first; those of equal load stay in their order."""
    return sorted(upstreams, key=loads.__getitem__)


def within_bound(
    preference: Preference, ready: Sequence[int], loads: Sequence[float], prompt_tokens: float
) -> Choice:
    """Return the order in which a request tries the upstreams that are ready.

    Args:
        preference: the order for the request.
        ready: the numbers of those that take requests; at least one.
        loads: of all upstreams, in tokens.
        prompt_tokens: of the request.
    """
    order = [number for number in preference.order if number in ready]
    group = max(sum(number in ready for number in preference.order[: preference.group]), 1)
    order[:group] = by_load(order[:group], loads)
    bound = bound_of([loads[number] for number in ready], prompt_tokens)
    # The sort is stable.
    bounded = sorted(order, key=lambda number: loads[number] > bound)
    return Choice(bounded, bounded[0] not in order[:group])


def bound_of(loads: Sequence[float], prompt_tokens: float) -> float:
    """Return the load above which an upstream is passed over; one of them is never above it."""
    mean = sum(loads) / len(loads)
    return max(SPREAD * mean, mean + MARGIN_TOKENS + PATIENCE * prompt_tokens)
