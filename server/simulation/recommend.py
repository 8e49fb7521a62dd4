"""Recommends a size of the memory tier, beyond which hits hardly increase."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from server.config.schema import Config, MemoryTierConfig
from server.simulation.simulate import Progress, memory_overhead_bytes, no_progress, simulate
from server.simulation.traces import Trace

_GIB = 1024**3
_HALVINGS = 10
_MIN_GAIN = 0.01
_STEP_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class SizePoint:
    """The hits of the memory tier alone at a size."""

    max_bytes: int
    hits: int
    hit_ratio: float


@dataclass(frozen=True, slots=True)
class SizeRecommendation:
    """The size from which on another `step_bytes` add less than 1% to the hits."""

    max_bytes: int
    step_bytes: int
    curve: list[SizePoint]
    """Hits by size, up to the size of the whole trace."""


def recommend(config: Config, trace: Trace, progress: Progress = no_progress) -> SizeRecommendation:
    """Replay a trace against the memory tier alone, at sizes that double."""
    memory = config.tiers.memory or MemoryTierConfig()
    whole_bytes = trace.footprint_bytes + len(trace.sizes) * memory_overhead_bytes(memory.policy)
    curve = []
    for halvings in range(_HALVINGS, -1, -1):
        tier = memory.model_copy(update={"max_bytes": max(1, whole_bytes >> halvings)})
        tiers = config.tiers.model_copy(update={"memory": tier, "disk": None})
        result = simulate(config.model_copy(update={"tiers": tiers}), trace, progress).result
        curve.append(SizePoint(tier.max_bytes, result.hits, result.hit_ratio))
    step_bytes = min(_GIB, max(1, int(_STEP_SHARE * whole_bytes)))
    return SizeRecommendation(_enough(curve, step_bytes), step_bytes, curve)


def _enough(curve: Sequence[SizePoint], step_bytes: int) -> int:
    """Return the smallest size of the curve from which on no step gains 1% of the hits."""
    min_gain = _MIN_GAIN * max(point.hits for point in curve)
    enough = curve[-1].max_bytes
    for point in reversed(curve[:-1]):
        if _hits_at(curve, point.max_bytes + step_bytes) - point.hits >= min_gain > 0:
            break
        enough = point.max_bytes
    return enough


def _hits_at(curve: Sequence[SizePoint], max_bytes: int) -> float:
    """Return the hits at a size, interpolated linearly."""
    after = bisect_left(curve, max_bytes, key=lambda point: point.max_bytes)
    if after == len(curve):
        return curve[-1].hits
    left, right = curve[after - 1], curve[after]
    part = (max_bytes - left.max_bytes) / (right.max_bytes - left.max_bytes)
    return left.hits + part * (right.hits - left.hits)
