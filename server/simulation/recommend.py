"""Recommends a size of the memory tier, beyond which hits hardly increase."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from server.config.schema import Config, MemoryTierConfig
from server.simulation.simulate import ShowProgress, memory_overhead_bytes, no_progress, simulate
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


def recommend(
    config: Config, trace: Trace, progress: ShowProgress = no_progress
) -> SizeRecommendation:
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
    enough = enough_bytes([(point.max_bytes, point.hits) for point in curve], step_bytes)
    return SizeRecommendation(enough, step_bytes, curve)


def enough_bytes(curve: Sequence[tuple[int, float]], step_bytes: int) -> int:
    """Return the smallest size of a curve of gains from which on no step gains 1% of the most."""
    min_gain = _MIN_GAIN * max(gain for _, gain in curve)
    enough = curve[-1][0]
    for max_bytes, gain in reversed(curve[:-1]):
        if _gain_at(curve, max_bytes + step_bytes) - gain >= min_gain > 0:
            break
        enough = max_bytes
    return enough


def _gain_at(curve: Sequence[tuple[int, float]], max_bytes: int) -> float:
    """Return the gain at a size, interpolated linearly."""
    after = bisect_left(curve, max_bytes, key=lambda point: point[0])
    if after == len(curve):
        return curve[-1][1]
    (left_bytes, left), (right_bytes, right) = curve[after - 1], curve[after]
    part = (max_bytes - left_bytes) / (right_bytes - left_bytes)
    return left + part * (right - left)
