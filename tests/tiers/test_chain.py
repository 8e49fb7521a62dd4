"""The chain: nearest first, promotion, expiry, and a tier's failure is a miss."""

from pathlib import Path

import pytest

from tiers import (
    Answer,
    Chain,
    DiskCache,
    Form,
    FrequencySketch,
    Freshness,
    MemoryCache,
    State,
    Tier,
)
from tiers.backend import ByteCache

ANSWER = Answer(Form.BODY, b"{}")


def chain_of(clock, *backends: ByteCache, **options) -> Chain:
    tiers = [Tier(backend.NAME, backend) for backend in backends]
    options = {"frequency": FrequencySketch(1024), "max_answer_bytes": 1000} | options
    return Chain(tiers, clock=clock, **options)


async def test_finds_what_was_stored_nearest_first(clock, tmp_path: Path) -> None:
    chain = chain_of(
        clock, MemoryCache(10_000, clock=clock), DiskCache(tmp_path, 1 << 20, clock=clock)
    )
    assert await chain.lookup("k") is None
    assert await chain.store("k", ANSWER, Freshness(60))
    hit = await chain.lookup("k")
    assert hit is not None
    assert (hit.tier, hit.entry.answer) == ("memory", ANSWER)
    await chain.close()


async def test_promotes_with_the_time_that_is_left(clock, tmp_path: Path) -> None:
    memory, disk = MemoryCache(10_000, clock=clock), DiskCache(tmp_path, 1 << 20, clock=clock)
    chain = chain_of(clock, memory, disk, promote_after=1)
    await chain.store("k", ANSWER, Freshness(60))
    await memory.clear()
    clock.now += 30
    tiers = [hit.tier for hit in (await chain.lookup("k"), await chain.lookup("k")) if hit]
    assert tiers == ["disk", "memory"]
    clock.now += 30
    assert await chain.lookup("k") is None
    await chain.close()


async def test_does_not_store_what_is_too_large(clock) -> None:
    chain = chain_of(
        clock, MemoryCache(10_000, clock=clock), frequency=FrequencySketch(1024), max_answer_bytes=1
    )
    assert not await chain.store("k", ANSWER, Freshness(60))
    assert await chain.lookup("k") is None


class Broken(MemoryCache):
    def read(self, key: str) -> bytes | None:
        raise OSError("no such disk")

    async def write(self, key: str, value: bytes, expires_at: float | None) -> bool:
        raise OSError("no such disk")


async def test_a_failing_tier_is_a_miss(clock) -> None:
    chain = chain_of(clock, Broken(10_000, clock=clock), MemoryCache(10_000, clock=clock))
    assert await chain.store("k", ANSWER, Freshness(60))
    hit = await chain.lookup("k")
    assert hit is not None
    assert hit.entry.answer == ANSWER
    # To store, and to look up; the hit was not asked for often enough to be promoted.
    assert chain.tiers[0].counts.errors == 2


async def test_foreign_bytes_are_a_miss(clock) -> None:
    memory = MemoryCache(10_000, clock=clock)
    chain = chain_of(clock, memory)
    await memory.set("k", b"written by somebody else")
    assert await chain.lookup("k") is None


async def test_says_what_a_stale_entry_may_be_used_for(clock) -> None:
    chain = chain_of(clock, MemoryCache(10_000, clock=clock))
    freshness = Freshness(60, stale_while_revalidate_s=20, stale_if_error_s=30)
    await chain.store("k", ANSWER, freshness)
    states = []
    for _ in range(5):
        hit = await chain.lookup("k")
        states.append(hit and (hit.state, hit.refresh))
        clock.now += {0: 59.5, 1: 0.5, 2: 20, 3: 10}.get(len(states) - 1, 0)
    assert states == [
        (State.FRESH, False), (State.FRESH, False), (State.STALE, True), (State.FALLBACK, False),
        None,
    ]  # fmt: skip


async def test_cuts_ttls_by_chance_within_the_jitter(clock) -> None:
    for chance, left_s in ((0.0, 60), (0.5, 57), (0.999, 54.006)):
        memory = MemoryCache(10_000, clock=clock)
        chain = chain_of(clock, memory, ttl_jitter=0.1, chance=lambda chance=chance: chance)
        await chain.store("k", ANSWER, Freshness(60))
        hit = await chain.lookup("k")
        assert hit is not None
        assert hit.entry.expires_at - clock.now == pytest.approx(left_s)


async def test_refreshes_early_the_likelier_the_closer_the_end(clock) -> None:
    """With a chance of one half, from took_s * ln 2 = 6.9 s before the end on."""
    chain = chain_of(clock, MemoryCache(10_000, clock=clock), chance=lambda: 0.5)
    await chain.store("k", ANSWER, Freshness(60), took_s=10)
    refreshed = []
    for _ in range(3):
        hit = await chain.lookup("k")
        refreshed.append(hit and (hit.state, hit.refresh))
        clock.now += 53 if len(refreshed) == 1 else 1
    fresh = State.FRESH
    assert refreshed == [(fresh, False), (fresh, False), (fresh, True)]
