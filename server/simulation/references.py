"""Reference policies: the hits of libcachesim's implementations, and the optimum.

libcachesim (https://libcachesim.com) is optional.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from server.simulation.traces import Trace

ONLINE = ("LRU", "LFU", "FIFO", "Random", "Sieve", "S3FIFO", "WTinyLFU", "ARC")
OPTIMUM = "Belady"
"""Evicts by future requests: no policy has more hits if all sizes are equal."""

_NEVER = 2**62
_UNITS = 1000


@dataclass(frozen=True, slots=True)
class ReferenceResult:
    """The hits of a policy. Ratios are of all requests."""

    policy: str
    hits: int
    hit_ratio: float
    byte_hit_ratio: float


def is_installed() -> bool:
    """Return whether libcachesim is installed."""
    return find_spec("libcachesim") is not None


def compare(trace: Trace, policy: str, max_bytes: int, overhead_bytes: int) -> ReferenceResult:
    """Replay a trace against an empty cache of libcachesim's.

    An entry costs its size and `overhead_bytes`, as in our memory tier. Entries don't expire.
    """
    requests = trace.requests
    costs = [(request.key, request.size + overhead_bytes) for request in requests]
    hits = replay(policy, costs, max_bytes)
    hit_bytes = sum(request.size for request, hit in zip(requests, hits, strict=True) if hit)
    all_bytes = sum(request.size for request in requests)
    hit_ratio = sum(hits) / len(requests)
    return ReferenceResult(
        policy, sum(hits), hit_ratio, hit_bytes / all_bytes if all_bytes else 0.0
    )


def replay(policy: str, requests: Sequence[tuple[str, int]], max_bytes: int) -> bytearray:
    """Replay keys with their costs (bytes) against an empty cache.

    Returns 1 for each hit, and 0 for each miss. A key keeps the cost it had when it was admitted. A
    key that costs more than the cache holds is not admitted.
    """
    import libcachesim

    hits = bytearray(len(requests))
    if all(cost > max_bytes for _, cost in requests):
        # Some policies abort the process if no key fits.
        return hits
    # Some policies split the cache into parts, and none of them may have 0 bytes.
    unit = _UNITS if max_bytes < _UNITS else 1
    cache = getattr(libcachesim, policy)(cache_size=max_bytes * unit, hashpower=16)
    request = libcachesim.Request()
    numbers: dict[str, int] = {}
    next_at = _next_at([key for key, _ in requests])
    for position, (key, cost) in enumerate(requests):
        request.obj_id = numbers.setdefault(key, len(numbers) + 1)
        request.obj_size = cost * unit
        request.clock_time = position
        request.next_access_vtime = next_at[position]
        hits[position] = cache.get(request)
    return hits


def _next_at(keys: Sequence[str]) -> list[int]:
    """Return for each request the position of the next one for its key, or `_NEVER`."""
    seen: dict[str, int] = {}
    next_at = [_NEVER] * len(keys)
    for position in range(len(keys) - 1, -1, -1):
        next_at[position] = seen.get(keys[position], _NEVER)
        seen[keys[position]] = position
    return next_at
