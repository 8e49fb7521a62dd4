"""Frequency decides what goes up and down, and what was learned survives a restart."""

import asyncio
import os
from pathlib import Path

import pytest

from tests.tiers.conftest import JSON, Remote
from tests.waiting import HANGS_S
from tiers import (
    Answer,
    BackgroundWork,
    Chain,
    Demotion,
    DiskCache,
    FrequencySketch,
    Freshness,
    MemoryCache,
    Purges,
    Tier,
    Transfers,
    WritePolicy,
)  # fmt: skip
from tiers.background import _refill
from tiers.disk import Durability
from tiers.disk.marks import CLEAN

ROOM_FOR_TWO = 6000
ANSWER = Answer(JSON, bytes(1800))
WEEK = Freshness(7 * 24 * 3600)


class House:
    """A memory tier with room for two answers over a disk tier."""

    def __init__(self, folder: Path, clock, *, write: WritePolicy = WritePolicy.ON_INSERT) -> None:
        self.frequency = FrequencySketch(1024)
        self.disk = DiskCache(
            folder, 1 << 20, worth=lambda key, _: self.frequency.estimate(key), clock=clock
        )
        disk = Tier("disk", self.disk)
        transfers = Transfers()
        purges = Purges(self.disk, clock=clock, deadline_s=HANGS_S)
        demotion = Demotion(
            [disk], self.frequency, transfers, purges, max_bytes=10_000, clock=clock
        )
        self.demotion = demotion
        self.memory = MemoryCache(ROOM_FOR_TWO, on_evict=demotion.offer, clock=clock)
        tiers = [Tier("memory", self.memory), disk]
        self.chain = Chain(
            tiers,
            frequency=self.frequency,
            max_answer_bytes=10_000,
            transfers=transfers,
            purges=purges,
            write=write,
            clock=clock,
        )
        self.movement = BackgroundWork(
            tiers, self.disk, self.frequency, demotion, purges, write=write, clock=clock
        )

    async def tier_of(self, key: str) -> str | None:
        hit = await self.chain.lookup(key)
        return hit and hit.tier

    async def close(self) -> None:
        await self.movement.close()
        await self.chain.close()


@pytest.fixture
async def house(tmp_path: Path, clock):
    made = House(tmp_path, clock)
    yield made
    await made.close()


async def test_what_is_asked_for_once_stays_on_disk(house: House) -> None:
    await house.disk.set("a", b"", ttl=1)
    await house.chain.store("a", ANSWER, WEEK)
    await house.memory.delete("a")
    assert [await house.tier_of("a") for _ in range(3)] == ["disk", "disk", "memory"]
    assert house.chain.tiers[0].counts.promotions == 1


async def test_a_promotion_has_to_beat_what_it_pushes_out(house: House) -> None:
    for key in "abc":
        await house.chain.store(key, ANSWER, WEEK)
    held = [key for key in "abc" if house.memory.holds(key)]
    (out,) = set("abc") - set(held)
    for key in held * 3:
        await house.tier_of(key)
    assert [await house.tier_of(out) for _ in range(4)] == ["disk"] * 4
    assert await house.tier_of(out) == "memory"


async def test_on_evict_writes_to_disk_what_memory_evicts(tmp_path: Path, clock) -> None:
    house = House(tmp_path, clock, write=WritePolicy.ON_EVICT)
    for key in "abc":
        await house.tier_of(key)
        await house.chain.store(key, ANSWER, WEEK)
    await house.demotion.drain()
    on_disk = [key for key in "abc" if house.disk.holds(key)]
    assert len(on_disk) == 1
    assert not house.memory.holds(on_disk[0])
    assert house.chain.tiers[1].counts.demotions == 1
    await house.close()
    again = House(tmp_path, clock)
    assert [await again.tier_of(key) for key in "abc"] == ["disk"] * 3
    await again.close()


@pytest.mark.parametrize("write", WritePolicy)
async def test_ends_while_the_file_is_still_being_verified(
    tmp_path: Path, clock, may_verify, write
) -> None:
    house = House(tmp_path, clock)
    await house.close()
    (tmp_path / CLEAN).unlink()
    house = House(tmp_path, clock, write=write)
    await house.movement.start()
    assert await house.chain.store("a", ANSWER, WEEK)
    await house.close()
    assert not house.movement.restored.is_set()


async def test_what_is_too_cold_is_not_demoted(tmp_path: Path, clock) -> None:
    house = House(tmp_path, clock, write=WritePolicy.ON_EVICT)
    for key in "abc":
        await house.chain.store(key, ANSWER, WEEK)
    await house.demotion.drain()
    assert [key for key in "abc" if house.disk.holds(key)] == []
    await house.close()


async def test_demotion_is_bounded_and_keeps_what_is_newer(house: House) -> None:
    frequency = house.frequency
    for key in ("old", "large", "other"):
        frequency.record(key)
    await house.disk.set("old", b"newer")
    expires_at = house.chain.clock() + 60
    house.demotion.offer("old", b"older", expires_at)
    house.demotion.offer("large", bytes(9_990), expires_at)
    house.demotion.offer("other", bytes(100), expires_at)
    await house.demotion.drain()
    assert house.demotion.dropped == 1
    assert await house.disk.get("old") == b"newer"
    assert house.disk.holds("large")
    assert not house.disk.holds("other")


async def test_a_restart_refills_memory_hottest_first(tmp_path: Path, clock) -> None:
    house = House(tmp_path, clock)
    await house.movement.start()
    await house.movement.restored.wait()
    for key in "abcdef":
        await house.chain.store(key, ANSWER, WEEK)
    house.memory.max_bytes = 0
    for key in "ebebebe":
        await house.memory.clear()
        assert await house.tier_of(key) == "disk"
    await house.close()

    again = House(tmp_path, clock)
    assert again.frequency.estimate("e") == 0
    await again.movement.start()
    await again.movement.restored.wait()
    assert again.frequency.estimate("e") == 4
    assert [again.memory.holds(key) for key in "abcdef"] == [False, True, False, False, True, False]
    await again.close()

    never_started = House(tmp_path, clock)
    await never_started.close()
    once_more = House(tmp_path, clock)
    await once_more.movement.start()
    await once_more.movement.restored.wait()
    assert once_more.frequency.estimate("e") == 4
    await once_more.close()


async def test_refilling_memory_lets_others_run_by_count_and_by_bytes(tmp_path, clock) -> None:
    disk = DiskCache(tmp_path, 64 << 20, durability=Durability.OS, clock=clock)
    sizes = {"small": 100, "large": 600_000}
    for name, size in sizes.items():
        for number in range(32):
            assert await disk.set(f"{name}{number}", os.urandom(size), ttl=60)
    nearest = Tier("memory", MemoryCache(64 << 20, clock=clock))
    turns, done = 0, asyncio.ensure_future(_refill(nearest, disk, Purges(), clock))
    while not done.done():
        before = nearest.counts.stores
        await asyncio.sleep(0)
        turns += 1
        assert nearest.counts.stores - before <= 16
    assert nearest.counts.stores == 64
    # 16 large ones for each second one, and two for the small ones.
    assert turns >= 18
    await disk.close()


async def test_what_is_purged_is_neither_demoted_nor_refilled(tmp_path: Path, clock) -> None:
    house = House(tmp_path, clock, write=WritePolicy.ON_EVICT)
    for key in "abcd":
        await house.tier_of(key)
        await house.chain.store(
            key, ANSWER, WEEK, provenance=house.chain.provenance([f"tag:{key}"])
        )
        await house.demotion.drain()
    assert [key for key in "abcd" if house.disk.holds(key)] == ["a", "b"]
    for key in "ac":
        await house.chain.purge(f"tag:{key}")
    await house.close()

    again = House(tmp_path, clock)
    assert [key for key in "abcd" if again.disk.holds(key)] == ["a", "b", "d"]
    await again.movement.start()
    await again.movement.restored.wait()
    assert not again.memory.holds("a")
    assert [await again.tier_of(key) for key in "abcd"] == [None, "memory", None, "memory"]
    await again.close()


async def test_at_the_end_the_hottest_are_written_first(tmp_path: Path, clock, monkeypatch) -> None:
    house = House(tmp_path, clock, write=WritePolicy.ON_EVICT)
    for key in "abc":
        await house.memory.set(key, ANSWER.content[:9], ttl=60)
    for key in "abb":
        house.frequency.record(key)
    written, put = [], Tier.put

    async def noting(tier: Tier, key: str, *args) -> bool:
        written.append(key)
        return await put(tier, key, *args)

    monkeypatch.setattr(Tier, "put", noting)
    await house.close()
    assert written == ["b", "a", "c"]


async def test_on_evict_never_brings_back_an_older_answer(tmp_path: Path, clock) -> None:
    house = House(tmp_path, clock, write=WritePolicy.ON_EVICT)
    older, newer = Answer(JSON, b"1" * 1800), Answer(JSON, b"2" * 1800)
    for key in "abc":
        await house.tier_of(key)
    await house.chain.store("a", older, WEEK)
    for key in "bc":
        await house.chain.store(key, ANSWER, WEEK)
    await house.demotion.drain()
    assert house.disk.holds("a")
    await house.chain.store("a", newer, WEEK)
    for key in "bc":
        await house.chain.store(key, ANSWER, WEEK)
    await house.demotion.drain()
    hit = await house.chain.lookup("a")
    assert hit is not None
    assert hit.entry.answer == newer
    await house.close()


async def test_a_store_outdates_what_waits_to_be_demoted(tmp_path: Path, clock) -> None:
    house = House(tmp_path, clock, write=WritePolicy.ON_EVICT)
    for key in "abc":
        await house.tier_of(key)
        await house.chain.store(key, ANSWER, WEEK)
    assert not house.memory.holds("a")
    await house.chain.store("a", Answer(JSON, b"newer"), WEEK)
    await house.demotion.drain()
    assert not house.disk.holds("a")
    await house.close()


async def test_the_end_writes_many_entries_at_once(clock) -> None:
    frequency, transfers, remote = (
        FrequencySketch(1024),
        Transfers(),
        Remote(clock, delay=lambda: 1),
    )
    tier = Tier("remote", remote)
    demotion = Demotion([tier], frequency, transfers, Purges(), max_bytes=10_000, clock=clock)
    entries = [(f"{number}", b"1", clock.now + number) for number in range(100)]
    await demotion.write_all([*entries, ("never expires", b"1", None)])
    # The first has expired.
    assert tier.counts.demotions == len(remote.held) == 99
    assert 10 < remote.most_at_once <= 64
    assert len(transfers) == 0


async def test_a_chain_without_tiers_only_misses(clock) -> None:
    frequency, purges = FrequencySketch(1024), Purges(clock=clock)
    demotion = Demotion([], frequency, Transfers(), purges, max_bytes=0, clock=clock)
    movement = BackgroundWork(
        [], None, frequency, demotion, purges, write=WritePolicy.ON_EVICT, clock=clock
    )
    chain = Chain([], frequency=frequency, max_answer_bytes=10, clock=clock)
    await movement.start()
    assert not await chain.store("k", Answer(JSON, b"{}"), WEEK)
    assert await chain.lookup("k") is None
    await movement.close()
    await chain.close()
