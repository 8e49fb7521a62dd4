"""The chain: nearest first, promotion, expiry, and a tier's failure is a miss."""

import asyncio
from functools import partial
from pathlib import Path

import pytest

from tests.tiers.conftest import JSON, Remote
from tiers import (
    Answer,
    Chain,
    DiskCache,
    Entry,
    FrequencySketch,
    Freshness,
    MemoryCache,
    State,
    Tier,
    Transfers,
    WritePolicy,
)
from tiers.backend import ByteCache
from tiers.chain import ImportResult
from tiers.entry import SKEW_S
from tiers.movement.queue import PendingWrite, WriteBehindQueue

ANSWER = Answer(JSON, b"{}")


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


async def renew(far: Tier, key: str, answer: Answer, clock, ttl_s: float = 60) -> None:
    """Store as another server would that shares the tier."""
    value = Entry(answer, clock.now, clock.now + ttl_s).encode()
    assert await far.backend.set(key, value, ttl=ttl_s)


async def test_looking_shows_what_a_lookup_would_give_out(clock) -> None:
    remote = Remote(clock, delay=lambda: 1)
    memory, shared = MemoryCache(10_000, clock=clock), Tier("shared", remote, shared=True)
    chain = Chain(
        [Tier("memory", memory), shared],
        frequency=FrequencySketch(1024),
        max_answer_bytes=1000,
        clock=clock,
    )
    new = Answer(JSON, b"new")
    await chain.store("k", ANSWER, Freshness(60, 60))
    clock.now += 60
    await renew(shared, "k", new, clock)
    # What may have been purged on other machines.
    for chain.purges.shared_unknown, expected in ((True, ANSWER), (False, new)):
        entry = await chain.peek("k")
        assert entry is not None
        assert entry.answer == expected
    assert (memory.usage.entries, chain.frequency("k")) == (1, 0)
    clock.now += 60
    assert await chain.peek("k") is None


async def test_what_is_stale_does_not_hide_what_others_have_renewed(clock, tmp_path: Path) -> None:
    remote = Remote(clock, delay=lambda: 1)
    memory, disk = MemoryCache(10_000, clock=clock), DiskCache(tmp_path, 1 << 20, clock=clock)
    shared = Tier("shared", remote, shared=True)
    tiers = [Tier("memory", memory), Tier("disk", disk), shared]
    chain = Chain(
        tiers, frequency=FrequencySketch(64), max_answer_bytes=99, promote_after=15, clock=clock
    )
    await chain.store("k", ANSWER, Freshness(60, 1000, 1000))
    clock.now += 61
    hit = await chain.lookup("k")
    assert hit is not None
    assert (hit.tier, hit.state, hit.refresh) == ("memory", State.STALE_WHILE_REVALIDATE, True)
    newer = Answer(JSON, b"newer")
    await renew(shared, "k", newer, clock)
    for tier in ("shared", "memory"):
        hit = await chain.lookup("k")
        assert hit is not None
        assert (hit.tier, hit.state, hit.entry.answer) == (tier, State.FRESH, newer)
        await chain.drain()
    # What was older is replaced in all nearer tiers, however rarely it is asked for.
    assert [tier.counts.promotions for tier in tiers] == [1, 1, 0]
    assert Entry.decode(disk.read("k") or b"").answer == newer
    await chain.close()


@pytest.mark.parametrize(
    ("ahead_s", "is_found"), [(0, True), (SKEW_S, True), (SKEW_S + 0.1, False), (3600, False)]
)
async def test_what_comes_from_the_future_is_as_good_as_none(clock, ahead_s, is_found) -> None:
    near = Tier("memory", MemoryCache(10_000, clock=clock))
    shared = Tier("shared", Remote(clock, delay=lambda: 0), shared=True)
    chain = Chain([near, shared], frequency=FrequencySketch(64), max_answer_bytes=99, clock=clock)
    clock.now += ahead_s
    await chain.store("k", ANSWER, Freshness(60, 60, 60))
    clock.now -= ahead_s
    assert (await chain.lookup("k") is not None) is is_found
    assert (await chain.peek("k") is not None) is is_found
    assert (await chain.find_newer("k", 0) is not None) is is_found
    # Nor does it keep out what comes from elsewhere, and is as new as it can be.
    new = Entry(Answer(JSON, b"new"), clock.now, clock.now + 60)
    adopted = await chain.import_entry("k", new, chain.tiers)
    assert adopted is (ImportResult.OLDER if is_found else ImportResult.STORED)


async def test_the_later_of_two_that_are_not_fresh_counts(clock) -> None:
    shared = Tier("shared", Remote(clock, delay=lambda: 0), shared=True)
    near = Tier("memory", MemoryCache(10_000, clock=clock))
    chain = Chain([near, shared], frequency=FrequencySketch(64), max_answer_bytes=99, clock=clock)
    await chain.store("k", ANSWER, Freshness(60, 1000))
    clock.now -= 1
    await renew(shared, "k", Answer(JSON, b"older"), clock, ttl_s=1000)
    clock.now += 100
    hit = await chain.lookup("k")
    assert hit is not None
    assert (hit.tier, hit.state, hit.entry.answer) == (
        "memory",
        State.STALE_WHILE_REVALIDATE,
        ANSWER,
    )


async def test_a_promotion_to_disk_does_not_hold_up_the_request(clock, tmp_path: Path) -> None:
    remote = Remote(clock, delay=lambda: 0)
    disk = DiskCache(tmp_path, 1 << 20, clock=clock)
    tiers = [Tier("disk", disk), Tier("shared", remote, shared=True)]
    transfers = Transfers()
    chain = Chain(
        tiers,
        frequency=FrequencySketch(64),
        max_answer_bytes=99,
        promote_after=1,
        transfers=transfers,
        clock=clock,
    )
    for key in "ab":
        await renew(tiers[1], key, ANSWER, clock)
    assert [(await chain.lookup(key)).tier for key in "ab"] == ["shared"] * 2
    assert tiers[0].counts.promotions == 0
    await chain.drain()
    assert tiers[0].counts.promotions == 2
    assert (await chain.lookup("a")).tier == "disk"
    # One that is under way is finished at the end.
    await renew(tiers[1], "c", ANSWER, clock)
    await chain.lookup("c")
    await chain.close()
    assert len(transfers) == 0
    again = DiskCache(tmp_path, 1 << 20, clock=clock)
    assert again.read("c") is not None
    await again.close()


async def test_a_store_outdates_a_promotion_that_waits(clock, tmp_path: Path) -> None:
    remote, disk = Remote(clock, delay=lambda: 0), DiskCache(tmp_path, 1 << 20, clock=clock)
    tiers = [Tier("disk", disk), Tier("shared", remote, shared=True)]
    chain = Chain(
        tiers, frequency=FrequencySketch(64), max_answer_bytes=99, promote_after=1, clock=clock
    )
    await renew(tiers[1], "k", ANSWER, clock)
    assert await chain.lookup("k") is not None
    newer = Answer(JSON, b"newer")
    await chain.store("k", newer, Freshness(60))
    await chain.drain()
    assert Entry.decode(disk.read("k") or b"").answer == newer
    await chain.close()


async def test_promotions_are_bounded(clock) -> None:
    """In bytes and in number; what has no room is counted, and let go."""
    transfers, written = Transfers(), []

    async def write(key: str) -> None:
        await asyncio.sleep(0)
        written.append(key)

    queue = WriteBehindQueue(100)
    for key, size in (("a", 60), ("b", 41), ("c", 40)):
        queue.offer(PendingWrite(transfers.begin(key), size, partial(write, key)))
    assert (queue.dropped, len(transfers)) == (1, 2)
    await queue.drain()
    assert (written, len(transfers)) == (["a", "c"], 0)
    for number in range(10_001):
        queue.offer(PendingWrite(transfers.begin(f"{number}"), 0, partial(write, "")))
    assert queue.dropped == 2
    await queue.drain()
    assert (len(written), len(transfers)) == (10_002, 0)


async def test_on_evict_stores_in_the_shared_tier_at_once(clock, tmp_path: Path) -> None:
    remote, disk = Remote(clock, delay=lambda: 0), DiskCache(tmp_path, 1 << 20, clock=clock)
    near = Tier("memory", MemoryCache(10_000, clock=clock))
    tiers = [near, Tier("disk", disk), Tier("shared", remote, shared=True)]
    chain = Chain(
        tiers,
        frequency=FrequencySketch(64),
        max_answer_bytes=99,
        write=WritePolicy.ON_EVICT,
        clock=clock,
    )
    assert await chain.store("k", ANSWER, Freshness(60))
    assert [tier.counts.stores for tier in tiers] == [1, 0, 1]
    await chain.close()


class Broken(MemoryCache):
    def read_entry(self, key: str) -> Entry | None:
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
        (State.FRESH, False), (State.FRESH, False), (State.STALE_WHILE_REVALIDATE, True),
        (State.STALE_IF_ERROR, False), None,
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
    """With a chance of one half, from generation_s * ln 2 = 6.9 s before the end on."""
    chain = chain_of(clock, MemoryCache(10_000, clock=clock), chance=lambda: 0.5)
    await chain.store("k", ANSWER, Freshness(60), generation_s=10)
    refreshed = []
    for _ in range(3):
        hit = await chain.lookup("k")
        refreshed.append(hit and (hit.state, hit.refresh))
        clock.now += 53 if len(refreshed) == 1 else 1
    fresh = State.FRESH
    assert refreshed == [(fresh, False), (fresh, False), (fresh, True)]
