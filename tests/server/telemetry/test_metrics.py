"""The metrics of what happened."""

from socket import socket

import pytest

from server.cache import open_cache
from server.engine.collector import EngineCollector, ModelState
from server.engine.supervisor import EngineState
from server.telemetry.metrics import _BOUNDS_S, Metrics
from tiers import Chain, DiskCache, FrequencySketch, MemoryCache, Purges, Tier
from tiers.shared.purges import SharedPurges
from tiers.singleflight.lock import LockStats
from tiers.tier import Counts

MISS = {"model": "m", "tier": "engine", "outcome": "miss"}


def made(
    *tiers: Tier,
    models=(),
    dropped=lambda: 0,
    waits: LockStats | None = None,
    **options,
) -> Metrics:
    chain = Chain(tiers, frequency=FrequencySketch(1), max_answer_bytes=1, **options)
    return Metrics(
        chain,
        demotions_dropped=dropped,
        lock_stats=waits or LockStats(),
        collectors=[EngineCollector(lambda: models)],
    )


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"tierserve_{name}", labels)


def buckets(metrics: Metrics) -> list[float | None]:
    bounds = [*map(str, _BOUNDS_S), "+Inf"]
    return [value(metrics, "request_seconds_bucket", **MISS, le=bound) for bound in bounds]


@pytest.mark.parametrize("number", range(len(_BOUNDS_S)))
def test_a_bound_belongs_to_its_bucket(number: int) -> None:
    bound = _BOUNDS_S[number]
    for seconds, first in ((bound * 0.999, number), (bound, number), (bound * 1.001, number + 1)):
        metrics = made()
        metrics.observe(("m", "engine", "miss"), [seconds])
        assert buckets(metrics) == [0] * first + [1] * (len(_BOUNDS_S) + 1 - first)


def test_bounds_are_in_order() -> None:
    assert list(_BOUNDS_S) == sorted(set(_BOUNDS_S))


def test_buckets_count_all_below_them() -> None:
    metrics = made()
    for seconds in (1000, 0.00005, 0.002, 0.002, 400):
        metrics.observe(("m", "engine", "miss"), [seconds])
    counts = dict(zip((*_BOUNDS_S, "+Inf"), buckets(metrics), strict=True))
    assert [counts[bound] for bound in (0.0001, 0.001, 0.0025, 300, "+Inf")] == [1, 1, 3, 3, 5]
    assert value(metrics, "request_seconds_sum", **MISS) == pytest.approx(1400.00405)
    assert value(metrics, "request_seconds_count", **MISS) == 5
    assert value(metrics, "requests_total", **MISS) == 5


def test_requests_are_counted_by_tier_and_outcome() -> None:
    metrics = made()
    for tier, outcome in (("memory", "hit"), ("memory", "hit"), ("disk", "hit"), ("disk", "stale")):
        metrics.observe(("m", tier, outcome), [0.001])
    assert value(metrics, "requests_total", model="m", tier="memory", outcome="hit") == 2
    assert value(metrics, "requests_total", model="m", tier="disk", outcome="hit") == 1
    assert value(metrics, "requests_total", model="m", tier="disk", outcome="stale") == 1
    assert value(metrics, "requests_total", model="m", tier="memory", outcome="stale") is None


def test_what_tiers_saved_is_told() -> None:
    metrics = made()
    for tokens, saved_s in ((3, 0.5), (4, 1.5), (0, 0)):
        metrics.observe(("m", "memory", "hit"), [0.001], tokens, saved_s)
    metrics.observe(("m", "engine", "miss"), [2], 5)
    hits = {"model": "m", "tier": "memory", "outcome": "hit"}
    assert value(metrics, "output_tokens_total", **hits) == 7
    assert value(metrics, "output_tokens_total", **MISS) == 5
    assert value(metrics, "saved_seconds_total", **hits) == 2
    assert value(metrics, "saved_seconds_total", **MISS) == 0


async def test_tiers_say_what_they_hold_and_did(tmp_path) -> None:
    memory, disk = Tier("memory", MemoryCache(4096)), Tier("disk", DiskCache(tmp_path, 1024**2))
    metrics = made(memory, disk)
    for tier, puts in ((memory, 2), (disk, 3)):
        for number in range(puts):
            assert await tier.put(str(number), bytes(1024), 60)
        await tier.get("none", Purges())
    for tier in (memory, disk):
        assert value(metrics, "tier_entries", tier=tier.name) == tier.backend.usage.entries > 0
        assert value(metrics, "tier_bytes", tier=tier.name) == tier.backend.usage.bytes > 0
        assert value(metrics, "tier_misses_total", tier=tier.name) == 1
    assert value(metrics, "tier_stores_total", tier="memory") == 2
    assert value(metrics, "tier_stores_total", tier="disk") == 3
    await disk.close()


def test_every_count_of_a_tier_is_told() -> None:
    tier = Tier("memory", MemoryCache(1024))
    metrics = made(tier, dropped=lambda: 9)
    for number, name in enumerate(Counts.__slots__):
        setattr(tier.counts, name, number)
        assert value(metrics, f"tier_{name}_total", tier="memory") == number
    assert value(metrics, "demotions_dropped_total") == 9


def test_what_a_tier_lost_is_told() -> None:
    memory = Tier("memory", MemoryCache(1024))
    metrics = made(memory)
    for number, name in enumerate(("evictions", "expirations", "damaged", "refused")):
        setattr(memory.backend.usage, name, number)
        assert value(metrics, f"tier_{name}_total", tier="memory") == number


async def test_looks_at_shared_purges_that_failed_are_told() -> None:
    with socket() as unused:
        unused.bind(("127.0.0.1", 0))
        # Nobody listens there.
        cache = open_cache(f"memcached://127.0.0.1:{unused.getsockname()[1]}")
        purges = Purges()
        shared = SharedPurges(purges, cache)
        metrics = made(purges=purges, shared_purges=shared)
        assert value(metrics, "shared_purge_errors_total") == 0
        for _ in range(2):
            assert not await shared.sync()
        assert value(metrics, "shared_purge_errors_total") == 2
        await cache.close()
    assert value(made(), "shared_purge_errors_total") == 0


@pytest.mark.parametrize("state", EngineState)
def test_the_engine_is_in_one_state(state: EngineState) -> None:
    metrics = made(
        models=[ModelState("m", state, 3, 7, 2, 1), ModelState("n", EngineState.READY, 0, 0, 0, 0)]
    )
    states = {each: value(metrics, "engine_state", model="m", state=each) for each in EngineState}
    assert states == {each: each is state for each in EngineState}
    assert value(metrics, "engine_state", model="n", state="ready") == 1
    assert value(metrics, "engine_restarts_total", model="m") == 3
    assert value(metrics, "no_engine_total", model="m") == 2
    assert value(metrics, "held_requests", model="m") == 1
    assert value(metrics, "engine_restarts_total", model="n") == 0
    assert value(metrics, "engine_requests", model="m") == 7


def test_waits_for_another_process_are_told() -> None:
    waits = LockStats(waiting=5, answered=1, took_over=2, gave_up=3, aborted=4)
    metrics = made(waits=waits)
    assert value(metrics, "flights_waiting") == 5
    ends = ("answered", "took_over", "gave_up", "aborted")
    assert [value(metrics, "flight_waits_total", end=end) for end in ends] == [1, 2, 3, 4]
