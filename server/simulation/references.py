"""Reference policies: what libcachesim's implementations make of a trace, and the optimum.

libcachesim (https://libcachesim.com) is optional; `is_installed` says whether it is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from server.simulation.traces import Trace

ONLINE = ("LRU", "LFU", "FIFO", "Random", "Sieve", "S3FIFO", "WTinyLFU", "ARC")
OPTIMUM = "Belady"
"""Knows the future; nothing finds more where all sizes are alike."""

_NEVER = 2**62
_UNITS = 1000


@dataclass(frozen=True, slots=True)
class ReferenceResult:
    """What a policy made of a trace. Ratios are of all requests."""

    policy: str
    hits: int
    hit_ratio: float
    byte_hit_ratio: float


def is_installed() -> bool:
    """Return whether libcachesim is there."""
    return find_spec("libcachesim") is not None


def compare(trace: Trace, policy: str, max_bytes: int, overhead_bytes: int) -> ReferenceResult:
    """Replay a trace against one cache of libcachesim's.

    An entry costs `overhead_bytes` beside its size, as in our memory tier. Nothing expires.
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
    """Replay keys with what they cost (bytes) against an empty cache.

    Returns 1 for each request that is a hit, and 0 for a miss. A key costs what it did when it was
    let in. What alone is larger than the cache is a miss and is not let in.
    """
    import libcachesim

    hits = bytearray(len(requests))
    if all(cost > max_bytes for _, cost in requests):
        # Some end the process where nothing fits.
        return hits
    # Some divide their room into parts, of which none may be empty.
    unit = _UNITS if max_bytes < _UNITS else 1
    cache = getattr(libcachesim, policy)(cache_size=max_bytes * unit, hashpower=16)
    asked = libcachesim.Request()
    numbers: dict[str, int] = {}
    next_at = _next_at([key for key, _ in requests])
    for position, (key, cost) in enumerate(requests):
        asked.obj_id = numbers.setdefault(key, len(numbers) + 1)
        asked.obj_size = cost * unit
        asked.clock_time = position
        asked.next_access_vtime = next_at[position]
        hits[position] = cache.get(asked)
    return hits


def _next_at(keys: Sequence[str]) -> list[int]:
    """Return for each position that of the next request for the same key, or `_NEVER`."""
    seen: dict[str, int] = {}
    next_at = [_NEVER] * len(keys)
    for position in range(len(keys) - 1, -1, -1):
        next_at[position] = seen.get(keys[position], _NEVER)
        seen[keys[position]] = position
    return next_at
